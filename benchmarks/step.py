"""Where a training step's time goes, what it holds, and how both grow; with our rollouts and with stock's.

    python benchmarks/step.py                                         # nano on this machine, tables
    python benchmarks/step.py --shape small --device cuda --prompts 16 --frames 500 --write
    python benchmarks/step.py --write                                 # also results/step-<device>.json and .md

One measurement is a whole step of `CFGDiversityTrainer` with full weights and a diversity reward that listens
to audio: P prompts × G clips, one micro-batch. Its parts are timed where the trainer calls them. The same
trainer takes its clips from the package's loop and from stock `generate` in turns, and the two are compared
within a turn, since the speed of a shared machine drifts. On a CPU it is process time, to which other
programs add by emptying the caches, but not by taking the processor, and memory is the process's largest
size during the step, less its size with nothing but the models loaded; on a GPU they are wall time of a
synchronised device, and torch's peak. The nano models are the shipped ones, other shapes have random weights.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss import RESULTS, environment
from rollout import SHAPES
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
    TrainerCallback,
)

from diverse_cfg.assets import nano_path
from diverse_cfg.atomic import write_text
from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.embeddings import load_embedder
from diverse_cfg.embeddings.contrastive import ContrastiveConfig, ContrastiveEmbedder, ContrastiveEncoder
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer
from diverse_cfg.trainer import trainer as trainer_module

# In the order of a step. "student" includes the loss and its gradient with respect to the logits.
PARTS = (
    "text",
    "refresh",
    "rollout",
    "decode",
    "embed",
    "teacher",
    "student",
    "backward",
    "optimizer",
    "other",
)
ROLLOUT_BACKENDS = {"stock": "transformers", "ours": "fast"}
BACKENDS = tuple(ROLLOUT_BACKENDS)


class Clock:
    """Seconds of the parts of the step that is running."""

    def __init__(self, device: str):
        self.device = device
        self.spent: dict[str, float] = {}

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, its time added to a part. Parts do not contain one another."""

        def run(*args, **kwargs):
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[part] = self.spent.get(part, 0.0) + self.now() - started

        return run


class Memory:
    """Peak of a step: torch's on a GPU, the process's on Linux; None where neither can be had."""

    def __init__(self, device: str):
        self.device = device
        self.loaded = 0.0

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what earlier steps have freed
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak anew
        except OSError:
            self.device = "unknown"

    def peak_mb(self) -> float | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        status = Path("/proc/self/status")
        if self.device == "unknown" or not status.exists():
            return None
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6


class Turns(TrainerCallback):
    """Times every optimiser step, and lets the two backends take turns; the first two steps warm up."""

    def __init__(self, clock: Clock, memory: Memory):
        self.clock, self.memory = clock, memory
        self.backend = BACKENDS[0]
        self.steps: list[dict] = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.backend = BACKENDS[state.global_step % 2]
        args.rollout_backend = ROLLOUT_BACKENDS[self.backend]
        if not state.global_step:
            optimizer.step = self.clock.timed("optimizer", optimizer.step)
        self.memory.start()
        self.clock.spent = {}
        self.started = self.clock.now()

    def on_step_end(self, args, state, control, **kwargs):
        total = self.clock.now() - self.started
        parts = dict(self.clock.spent)
        parts["other"] = total - sum(parts.values())
        self.steps.append(
            {"backend": self.backend, "seconds": total, "parts": parts, "peak": self.memory.peak_mb()}
        )


def build(shape: str) -> tuple[Any, Any, Any]:
    """Policy, processor and an embedder of audio."""
    processor = load_processor(str(nano_path()))
    if shape == "nano":
        return load_policy(str(nano_path())), processor, load_embedder(nano_path("eval-encoder"))
    layers, hidden, heads, vocab = SHAPES[shape]
    tiny = shape == "tiny"
    width = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2} if tiny else {}
    base = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    text = T5Config(vocab_size=len(processor.tokenizer), dropout_rate=0.1, **(width or base))
    codec = EncodecConfig(
        target_bandwidths=[50 * 4 * (vocab - 1).bit_length() / 1000],
        sampling_rate=32_000,
        upsampling_ratios=[8, 5, 4, 4],
        hidden_size=8 if tiny else 128,
        num_filters=2 if tiny else 64,
        codebook_size=vocab,
        codebook_dim=8 if tiny else 128,
        use_causal_conv=False,
        norm_type="weight_norm",
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        pad_token_id=vocab,
        bos_token_id=vocab,
    )
    torch.manual_seed(0)
    config = MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)
    policy = load_policy(MusicgenForConditionalGeneration(config))
    for layer in policy.audio_encoder.quantizer.layers:
        layer.codebook.embed.normal_()  # zeros in a fresh model, so that every clip would be silent
    paper = ContrastiveConfig(hidden_size=24 if tiny else 384, num_layers=1 if tiny else 12, num_heads=6)
    return policy, processor, ContrastiveEmbedder(ContrastiveEncoder(paper))


def measure(case: dict, args: argparse.Namespace) -> list[dict]:
    """One row per backend, stock first."""
    policy, processor, embedder = build(args.shape)
    clips = case["prompts"] * case["generations"]
    steps = 2 * (args.rounds + 1)
    prompts = [f"a song in the key of c, number {index}" for index in range(case["prompts"] * steps)]
    rate = policy.config.audio_encoder.sampling_rate / policy.config.audio_encoder.hop_length
    with tempfile.TemporaryDirectory() as folder:
        settings = CFGDiversityConfig(
            output_dir=folder,
            num_generations=case["generations"],
            per_device_train_batch_size=clips,
            clip_seconds=case["frames"] / rate,
            max_steps=steps,
            diversity_coef=5.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=args.dtype == "bfloat16",
            use_cpu=args.device == "cpu",
            gradient_checkpointing=args.checkpointing,
            logging_steps=10**6,
        )
        clock, memory = Clock(args.device), Memory(args.device)
        turns = Turns(clock, memory)
        trainer = CFGDiversityTrainer(
            policy,
            DiversityReward(embedder),
            settings,
            train_dataset=prompts,
            processing_class=processor,
            callbacks=[turns],
        )
        memory.start()
        memory.loaded = memory.peak_mb() or 0.0
        with instrumented(trainer, turns):
            trainer.train()
    return summary(case, turns.steps[2:], memory.loaded)


class instrumented:
    """While active, the trainer's calls are timed."""

    def __init__(self, trainer: CFGDiversityTrainer, turns: Turns):
        self.places: list[tuple[Any, str, Any]] = []
        timed = turns.clock.timed
        self.new = [
            (trainer._policy, "encode_text", timed("text", trainer._policy.encode_text)),
            (trainer._policy, "sample", timed("rollout", trainer._policy.sample)),
            (trainer._policy, "decode", timed("decode", trainer._policy.decode)),
            (trainer_module, "student_terms", timed("student", trainer_module.student_terms)),
            (trainer._sample, "rollout_weights", timed("refresh", trainer._sample.rollout_weights)),
            (trainer._housekeeping, "_measure", lambda: (0.0, 0.0)),  # the estimate at the start
            (trainer, "_teacher", _Callable(timed("teacher", trainer._teacher), trainer._teacher)),
            (trainer.accelerator, "backward", timed("backward", trainer.accelerator.backward)),
        ]
        embedder = trainer.reward_funcs[0].embedder
        self.new.append((embedder, "embed", timed("embed", embedder.embed)))

    def __enter__(self) -> None:
        for owner, name, value in self.new:
            self.places.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    def __exit__(self, *_: Any) -> None:
        for owner, name, value in self.places:
            setattr(owner, name, value)


class _Callable:
    """A teacher whose calls are timed; everything else is the teacher's."""

    def __init__(self, function: Callable, teacher: Any):
        self._function, self._teacher = function, teacher

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)


def summary(case: dict, steps: list[dict], loaded: float) -> list[dict]:
    """Medians over the rounds, and the ratio of the backends within each."""
    by_backend = {name: [step for step in steps if step["backend"] == name] for name in BACKENDS}
    rows = []
    for name, own in by_backend.items():
        pairs = list(zip(by_backend["stock"], own, strict=True))
        speedups = [slow["seconds"] / fast["seconds"] for slow, fast in pairs]
        rollouts = [slow["parts"]["rollout"] / _rollout_seconds(fast) for slow, fast in pairs]
        peaks = [step["peak"] - loaded for step in own if step["peak"] is not None]
        rows.append(
            case
            | {
                "backend": name,
                "seconds": statistics.median(step["seconds"] for step in own),
                "parts": {part: statistics.median(s["parts"].get(part, 0.0) for s in own) for part in PARTS},
                "peak_mb": max(peaks) if peaks else None,
                "speedup": statistics.median(speedups),
                "speedup_spread": [min(speedups), max(speedups)],
                "rollout_speedup": statistics.median(rollouts),
            }
        )
    return rows


def _rollout_seconds(step: dict) -> float:
    return step["parts"]["rollout"] + step["parts"].get("refresh", 0.0)


def cases(args: argparse.Namespace) -> list[dict]:
    """The base case, and cases that differ from it in one number."""
    base = {"prompts": args.prompts, "generations": args.generations, "frames": args.frames}
    found = [base]
    for name in ("prompts", "generations", "frames"):
        found += [base | {name: value} for value in getattr(args, f"grow_{name}") if value != base[name]]
    return found


def split_table(rows: list[dict]) -> str:
    """Markdown: where the time goes."""
    head = ["P × G", "T", "rollouts", "step, s", *PARTS, "faster than with stock (min – max)"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        low, high = row["speedup_spread"]
        faster = "1" if row["backend"] == "stock" else f"{row['speedup']:.2f} × ({low:.2f} – {high:.2f})"
        shares = [f"{row['parts'][part] / row['seconds']:.1%}" for part in PARTS]
        cells = [f"{row['prompts']} × {row['generations']}", row["frames"], row["backend"]]
        cells += [f"{row['seconds']:.2f}", *shares, faster]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def growth_table(rows: list[dict]) -> str:
    """Markdown: a step with our rollouts against the first case, in clips, time and memory."""
    ours = [row for row in rows if row["backend"] == "ours"]
    base = ours[0]
    head = ["P × G", "T", "codes", "time", "rollout", "update", "peak, MB", "peak"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]

    def codes(row: dict) -> int:
        return row["prompts"] * row["generations"] * row["frames"]

    def update(row: dict) -> float:
        return sum(row["parts"][part] for part in ("teacher", "student", "backward", "optimizer"))

    for row in ours:
        cells = [
            f"{row['prompts']} × {row['generations']}",
            row["frames"],
            f"{codes(row) / codes(base):.2g} ×",
        ]
        cells += [f"{row['seconds'] / base['seconds']:.2f} ×"]
        cells += [f"{row['parts']['rollout'] / base['parts']['rollout']:.2f} ×"]
        cells += [f"{update(row) / update(base):.2f} ×"]
        if row["peak_mb"] is not None:
            cells += [f"{row['peak_mb']:.0f}", f"{row['peak_mb'] / base['peak_mb']:.2f} ×"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def without_decoding(row: dict) -> float:
    """Seconds of a step less its decoding."""
    return row["seconds"] - row["parts"]["decode"]


def report(rows: list[dict], where: dict, load: list[float]) -> str:
    """The results page."""
    parts = ["# A training step", str(__doc__).strip().split("\n\n")[-1]]
    if max(load) > 1.5 * (os.cpu_count() or 1):
        parts.append(
            "**The machine was busy with other work (see the load average), which empties the caches: the\n"
            "figures are to be taken again on a quiet one.**"
        )
    if not (RESULTS / "step-cuda.md").exists() and where["timed on"] == "cpu":
        parts.append("No GPU has been measured yet.")
    stock, ours = rows[:2]
    shares = [row["parts"]["rollout"] / row["seconds"] for row in (stock, ours)]
    parts += [
        "## Where the time goes",
        split_table(rows),
        f"The rollout is {shares[0]:.0%} of a step with stock `generate` and {shares[1]:.0%} with ours, which "
        f"samples {ours['rollout_speedup']:.1f} times as fast.",
        f"An encoder that reads codes spares the decoding: by these figures the step is then "
        f"{without_decoding(stock) / without_decoding(ours):.2f} times as fast as with stock rollouts.",
        "## How it grows",
        "With our rollouts, against the first row; *update* is teacher, student, backward and optimiser.",
        growth_table(rows),
        "\n".join(f"- {name}: {value}" for name, value in where.items()),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description="Time and memory of a training step.")
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--prompts", type=int, default=4, metavar="P", help="prompts of a step")
    parser.add_argument("--generations", type=int, default=4, metavar="G", help="clips per prompt")
    parser.add_argument("--frames", type=int, default=75, metavar="T")
    parser.add_argument("--grow-prompts", type=int, nargs="*", default=[8, 16], metavar="P")
    parser.add_argument("--grow-generations", type=int, nargs="*", default=[8, 16], metavar="G")
    parser.add_argument("--grow-frames", type=int, nargs="*", default=[25, 50], metavar="T")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timings of either backend, taken in turns")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="JSON and Markdown"
    )
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if min(args.rounds, args.prompts, args.frames) < 1 or args.generations < 3:
        parser.error("rounds, prompts and frames must be at least 1, generations at least 3")

    load, rows = [os.getloadavg()[0]], []
    for case in cases(args):
        rows += measure(case, args)
        print(*split_table(rows[-2:]).splitlines()[2:], sep="\n", flush=True)
    load.append(os.getloadavg()[0])
    where = environment(args.device) | {
        "timed on": args.device,
        "shape": args.shape,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "load average before and after": f"{load[0]:.1f}, {load[1]:.1f}",
    }
    text = report(rows, where, load)
    print(f"\n{text}")
    if args.write:
        write_text(args.write / f"step-{args.device}.md", text)
        record = {"environment": where, "rows": rows, "load": load}
        write_text(
            args.write / f"step-{args.device}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
