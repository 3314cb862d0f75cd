"""Time of sampling codes: the package's loop against stock `generate`, with random weights of true shapes.

    python benchmarks/rollout.py                                      # nano on this machine, a table
    python benchmarks/rollout.py --shape small --batch 1 4 8 --frames 50
    python benchmarks/rollout.py --shape small --device cuda --dtype bfloat16 --bandwidth 4300 --write
    python benchmarks/rollout.py --write                              # also benchmarks/results/rollout-nano-cpu

Text encoder and codec are left out on both sides. The loop's snapshot of the weights, taken once per call (or
per training step), is timed by itself. Stock runs in the model's dtype (float32 on a CPU, bfloat16 on a GPU),
the loop in each --dtype. All variants are measured in turns, round after round, and compared within a round,
since the speed of a shared machine drifts. On a CPU it is process time, to which other programs add by
emptying the caches, but not by taking the processor. With --bandwidth (GB/s), a step is also held against the
time of reading weights and caches once.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from loss import RESULTS, environment
from transformers import (
    EncodecConfig,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)
from transformers.modeling_outputs import BaseModelOutput

from diverse_cfg.atomic import write_text
from diverse_cfg.policies.sampler.rollout import RolloutWeights, sample_codes
from diverse_cfg.types import TextCondition

# decoder layers, hidden size, heads, codes per codebook
SHAPES = {
    "tiny": (2, 16, 2, 16),
    "nano": (5, 160, 4, 512),
    "small": (24, 1024, 16, 2048),
    "medium": (48, 1536, 24, 2048),
    "large": (48, 2048, 32, 2048),
}
TEXT_TOKENS = 14


def make_model(shape: str, device: str) -> MusicgenForConditionalGeneration:
    """A MusicGen with random weights; its text encoder and codec are dwarfs, since they are not measured."""
    layers, hidden, heads, vocab = SHAPES[shape]
    text = T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    codec = EncodecConfig(
        target_bandwidths=[1.6],
        sampling_rate=32000,
        upsampling_ratios=[8, 5, 4, 4],
        hidden_size=8,
        num_filters=2,
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
    with torch.device(device):
        model = MusicgenForConditionalGeneration(
            MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)
        )
    model.audio_encoder.decode = lambda codes, audio_scales: SimpleNamespace(audio_values=codes)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, pad_token_id=vocab, bos_token_id=vocab, decoder_start_token_id=vocab
    )
    return model.eval().to(torch.bfloat16 if device == "cuda" else torch.float32)


def stock(model: Any, condition: TextCondition, num_frames: int, guidance_scale: float) -> None:
    """Sample with `generate`."""
    ids = condition.attention_mask
    if guidance_scale > 1:
        condition = condition.cat(condition.null())
    model.generate(
        input_ids=ids,
        encoder_outputs=BaseModelOutput(last_hidden_state=condition.hidden_states),
        attention_mask=condition.attention_mask,
        max_new_tokens=num_frames + 3,
        guidance_scale=guidance_scale,
    )


def seconds(function: Callable[[], Any], device: str) -> float:
    """Process time on a CPU, wall time of a synchronised GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = clock()
    function()
    wait()
    return clock() - start


def bytes_per_step(weights: RolloutWeights, batch: int, guided: bool, num_steps: int) -> float:
    """What one step has to read: the matrices once, and the caches, on average half full."""
    skipped = ("embedding", "positions", "text.weight", "text.bias")
    matrices = sum(t.nbytes for name, t in weights.tensors.items() if name not in skipped)
    matrices -= sum(layer.cross_key_value.nbytes for layer in weights.layers)
    row = 2 * len(weights.layers) * weights.shape.hidden_size * weights.tensors["heads"].element_size()
    return matrices + batch * row * (TEXT_TOKENS + (2 if guided else 1) * num_steps / 2)


def measure(
    model: Any, shape: str, batch: int, guidance_scale: float, args: argparse.Namespace
) -> list[dict]:
    """One row per variant, stock first."""
    width = model.config.text_encoder.d_model
    hidden = torch.randn(batch, TEXT_TOKENS, width, device=args.device, dtype=model.dtype)
    condition = TextCondition(hidden, torch.ones(batch, TEXT_TOKENS, dtype=torch.long, device=args.device))
    dtypes = [getattr(torch, name) for name in args.dtype]
    snapshots = {
        str(dtype).removeprefix("torch."): RolloutWeights.from_model(model, dtype) for dtype in dtypes
    }

    def ours(weights: RolloutWeights) -> None:
        sample_codes(model, condition, args.frames, guidance_scale=guidance_scale, weights=weights)

    variants: dict[str, Callable[[], None]] = {
        "stock": lambda: stock(model, condition, args.frames, guidance_scale),
        **{name: lambda weights=weights: ours(weights) for name, weights in snapshots.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()
    for _ in range(args.rounds):
        for name, function in variants.items():
            times[name].append(seconds(function, args.device))
    rows = []
    for name in variants:
        speedups = [slow / fast for slow, fast in zip(times["stock"], times[name], strict=True)]
        step = statistics.median(times[name]) / (args.frames + 3)
        row = {
            "shape": shape,
            "batch": batch,
            "guidance_scale": guidance_scale,
            "variant": name,
            "ms_per_step": 1e3 * step,
            "clips_per_second": batch / statistics.median(times[name]),
            "speedup": statistics.median(speedups),
            "speedup_spread": [min(speedups), max(speedups)],
        }
        if args.bandwidth and name != "stock":
            num_bytes = bytes_per_step(snapshots[name], batch, guidance_scale > 1, args.frames + 3)
            limit = num_bytes / (1e9 * args.bandwidth)
            row["times_the_limit"] = step / limit
        rows.append(row)
    return rows


def as_table(rows: list[dict]) -> str:
    """Markdown."""
    limits = any("times_the_limit" in row for row in rows)
    head = ["shape", "B", "γ", "sampler", "ms/step", "clips/s", "faster than stock (min – max)"]
    head += ["× bandwidth limit"] if limits else []
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        low, high = row["speedup_spread"]
        faster = "1" if row["variant"] == "stock" else f"{row['speedup']:.2f} × ({low:.2f} – {high:.2f})"
        name = row["variant"] if row["variant"] == "stock" else f"ours, {row['variant']}"
        cells = [row["shape"], row["batch"], f"{row['guidance_scale']:g}", name]
        cells += [f"{row['ms_per_step']:.2f}", f"{row['clips_per_second']:.1f}", faster]
        cells += [f"{row['times_the_limit']:.1f}" if "times_the_limit" in row else ""] if limits else []
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def student_against_guided_stock(rows: list[dict]) -> str:
    """What distillation buys a user: a clip without guidance from the loop, against a guided one of stock."""
    lines = []
    for row in rows:
        if row["variant"] == "stock" or row["guidance_scale"] != 1:
            continue
        for other in rows:
            same = (other["shape"], other["batch"]) == (row["shape"], row["batch"])
            if same and other["variant"] == "stock" and other["guidance_scale"] > 1:
                ratio = other["ms_per_step"] / row["ms_per_step"]
                lines.append(
                    f"- {row['shape']}, B = {row['batch']}: ours ({row['variant']}) without guidance is "
                    f"{ratio:.1f} × as fast as stock with γ = {other['guidance_scale']:g}"
                )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description="Time of sampling codes.")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["nano"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64], metavar="B")
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0, 3.0], metavar="γ")
    parser.add_argument("--frames", type=int, default=75)
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timings of every variant, taken in turns")
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, GB/s")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="JSON and Markdown"
    )
    args = parser.parse_args(arguments)
    if min(args.rounds, args.frames, *args.batch) < 1 or not all(map(math.isfinite, args.guidance_scale)):
        parser.error("rounds, frames and batch must be at least 1, and γ finite")

    load, snapshot_times = [os.getloadavg()[0]], []
    rows = []
    for shape in args.shape:
        model = make_model(shape, args.device)
        for name in args.dtype:
            take = partial(RolloutWeights.from_model, model, getattr(torch, name))
            take()  # the first also pays for memory that the system hands out
            spent = seconds(take, args.device)
            snapshot_times.append(f"{shape} in {name} {1e3 * spent:.0f} ms")
        for batch in args.batch:
            for guidance_scale in args.guidance_scale:
                rows += measure(model, shape, batch, guidance_scale, args)
                print(*as_table(rows[-1 - len(args.dtype) :]).splitlines()[2:], sep="\n", flush=True)
    load.append(os.getloadavg()[0])
    where = environment(args.device) | {
        "rounds": args.rounds,
        "frames": args.frames,
        "snapshot": ", ".join(snapshot_times),
        "cores": os.cpu_count(),
        "load average before and after": f"{load[0]:.1f}, {load[1]:.1f}",
    }
    text = report(rows, where, load)
    print(f"\n{text}")
    if args.write:
        stem = f"rollout-{'-'.join(args.shape)}-{args.device}"
        write_text(args.write / f"{stem}.md", text)
        kept = {"environment": where, "rows": rows, "load": load}
        write_text(args.write / f"{stem}.json", json.dumps(kept, indent=2))


def report(rows: list[dict], where: dict, load: list[float]) -> str:
    """The results page."""
    parts = ["# Rollouts", (__doc__ or "").split("\n\n")[2].strip()]
    if max(load) > 1.5 * (os.cpu_count() or 1):
        parts.append(
            "**The machine was busy with other work (see the load average), which empties the caches: the\n"
            "figures are to be taken again on a quiet one.**"
        )
    if not any(RESULTS.glob("rollout-*cuda.md")):
        parts.append(
            "No GPU has been measured yet. The path for it (CUDA graphs of the static loop) is complete; its loop\n"
            "is held against this one by tests on a CPU, also under `torch.compile`."
        )
    facts = "\n".join(f"- {name}: {value}" for name, value in where.items())
    parts += [as_table(rows), student_against_guided_stock(rows), facts]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    main()
