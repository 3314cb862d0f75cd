"""Peak memory and time of the distillation loss: in chunks with analytic gradient, against autograd at once.

    python benchmarks/loss.py                              # both shapes on this machine, a table
    python benchmarks/loss.py --shape small --device cuda --write
    python benchmarks/loss.py --write                      # also results/loss-<device>.json and .md

One measurement is a forward and backward pass of `distillation_loss` over one micro-batch: reverse KL
to a guided teacher, policy gradient, gradients of hidden states and (unless frozen, as with LoRA) of the
heads. Memory is what the pass itself allocates at its peak, in units of one float32 logits tensor [N, K, S,
V]. Times are taken in turns, one variant after the other and round after round, and given as ratios within a
round, since the speed of a shared machine drifts.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from diverse_cfg.atomic import write_text
from diverse_cfg.functional.distillation import GuidedTeacher, distillation_loss

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the loss with autograd, which the tests compare with as well
from tests.functional.autograd_loss import autograd_loss  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
# N clips, K codebooks, T frames, V codes, H hidden size
SHAPES = {
    "tiny": (2, 4, 40, 64, 16),
    "nano": (64, 4, 75, 512, 128),
    "small": (4, 4, 500, 2048, 1024),  # musicgen-small, 10 s
}
AT_ONCE = None


def make_pass(shape: tuple[int, ...], device: str, train_heads: bool) -> Callable[[int | None], None]:
    """A function that runs one forward and backward pass with a given chunk size."""
    num_rows, num_codebooks, num_frames, vocab_size, hidden_size = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device)

    hidden, cond, uncond = (draw(num_rows, num_frames + num_codebooks - 1, hidden_size) for _ in range(3))
    heads = draw(num_codebooks, vocab_size, hidden_size) / hidden_size**0.5
    codes = torch.randint(vocab_size, (num_rows, num_codebooks, num_frames), generator=generator).to(device)
    weights = draw(num_rows, num_codebooks, num_frames) / codes.numel()
    teacher = GuidedTeacher(cond, uncond, heads.clone(), 3.0)
    delays = tuple(range(num_codebooks))
    hidden.requires_grad_()
    heads.requires_grad_(train_heads)

    def one_pass(chunk_size: int | None) -> None:
        hidden.grad = heads.grad = None
        material = hidden, heads, codes, teacher
        settings = {"divergence_weights": 1 / codes.numel(), "logp_weights": weights, "delays": delays}
        if chunk_size is AT_ONCE:
            autograd_loss(*material, **settings).loss.backward()
        else:
            distillation_loss(*material, **settings, chunk_size=chunk_size).loss.backward()

    return one_pass


def peak_bytes(function: Callable[[], None], device: str) -> int:
    """Bytes that `function` holds at once at its peak, beyond what was there before."""
    function()  # warm up, so that lazily made workspaces do not count
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def seconds(function: Callable[[], None], device: str) -> float:
    """Process time on a CPU (others may share it), wall time around a synchronised GPU."""
    if device != "cuda":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, chunk_sizes: list[int], device: str, rounds: int, train_heads: bool) -> list[dict]:
    """One row per variant; the first is the loss at once."""
    shape = SHAPES[name]
    one_pass = make_pass(shape, device, train_heads)
    num_rows, num_codebooks, num_frames, vocab_size, _ = shape
    logits_bytes = 4 * num_rows * num_codebooks * (num_frames + num_codebooks - 1) * vocab_size
    variants = [AT_ONCE, *chunk_sizes]
    peaks = {v: peak_bytes(lambda v=v: one_pass(v), device) for v in variants}
    times = {v: [] for v in variants}
    for _ in range(rounds):
        for variant in variants:
            times[variant].append(seconds(lambda variant=variant: one_pass(variant), device))
    rows = []
    for variant in variants:
        speedups = [slow / fast for slow, fast in zip(times[AT_ONCE], times[variant], strict=True)]
        rows.append(
            {
                "shape": name,
                "heads": "trained" if train_heads else "frozen",
                "chunk_size": variant,
                "peak_mb": peaks[variant] / 1e6,
                "peak_logits_tensors": peaks[variant] / logits_bytes,
                "seconds": statistics.median(times[variant]),
                "speedup": statistics.median(speedups),
                "speedup_spread": [min(speedups), max(speedups)],
            }
        )
    return rows


def environment(device: str) -> dict:
    """What the numbers were taken on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }


def as_table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| shape | heads | chunk | peak, MB | peak, logits tensors | time, s | faster by (min – max) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["speedup_spread"]
        chunk = "at once" if row["chunk_size"] is None else f"{row['chunk_size']} steps"
        faster = "1" if row["chunk_size"] is None else f"{row['speedup']:.2f} × ({low:.2f} – {high:.2f})"
        lines.append(
            f"| {row['shape']} | {row['heads']} | {chunk} | {row['peak_mb']:.1f} "
            f"| {row['peak_logits_tensors']:.2f} | {row['seconds']:.3f} | {faster} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description="Memory and time of the distillation loss.")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["nano", "small"])
    parser.add_argument("--chunk-size", type=int, nargs="+", default=[128, 512, 2048], metavar="STEPS")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timings of every variant, taken in turns")
    parser.add_argument("--frozen-heads", action="store_true", help="as with LoRA: no gradient for the heads")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="JSON and Markdown"
    )
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")

    rows = []
    for name in args.shape:
        rows += measure(name, args.chunk_size, args.device, args.rounds, not args.frozen_heads)
    where = environment(args.device)
    where["rounds"] = args.rounds
    print(as_table(rows))
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    if args.write is None:
        return
    shapes = {name: dict(zip("NKTVH", SHAPES[name], strict=True)) for name in args.shape}
    record = {"environment": where, "shapes": shapes, "rows": rows}
    write_text(
        args.write / f"loss-{args.device}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    )
    described = "\n".join(
        f"- `{name}`: " + ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
        for name, sizes in shapes.items()
    )
    facts = "\n".join(f"- {key}: {value}" for key, value in where.items())
    method = str(__doc__).strip().split("\n\n")[-1]
    sections = ["# The distillation loss in chunks", method, as_table(rows), described, facts]
    write_text(args.write / f"loss-{args.device}.md", "\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
