"""Peak memory and time of merging two checkpoints, against what the disk alone takes.

    python benchmarks/merge.py --shape tiny
    python benchmarks/merge.py --shape medium --folder /scratch --write    # also results/merge.json and .md

Random float32 checkpoints of the released models' true shapes are written to --folder (three times their
size is needed while it runs) and merged at 0.5, each merge in a process of its own. Memory is how far the
process grows during the merge, in units of one checkpoint: a program that loads both parents needs at least
2. The disk's time is reading the same inputs and writing as many bytes as the output has, to disk (fsync),
without any arithmetic; both start with inputs that the page cache has been asked to drop, and are given as
the ratio within a round, in turns.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from diverse_cfg.atomic import write_text

RESULTS = Path(__file__).parent / "results"
# decoder layers, hidden size, attention heads of the released models
SHAPES = {"tiny": (4, 256, 4), "small": (24, 1024, 16), "medium": (48, 1536, 24), "large": (48, 2048, 32)}
CASES = ("full", "adapter")
RANK = 16
_CHUNK = 1 << 24


def make_config(shape: str):
    """The released configuration (T5-base, EnCodec 32 kHz, 4 × 2048 codes), but for the tiny text encoder."""
    from transformers import EncodecConfig, MusicgenConfig, MusicgenDecoderConfig, T5Config

    layers, hidden, heads = SHAPES[shape]
    text = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    if shape == "tiny":
        text = T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, vocab_size=512)
    codec = EncodecConfig(
        target_bandwidths=[2.2],
        sampling_rate=32000,
        audio_channels=1,
        codebook_size=2048,
        codebook_dim=128,
        upsampling_ratios=[8, 5, 4, 4],
        num_filters=64,
        use_causal_conv=False,
    )
    decoder = MusicgenDecoderConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_dim=4 * hidden
    )
    return MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)


def make_checkpoint(folder: Path, shape: str, seed: int) -> None:
    """A complete folder with random weights, written tensor by tensor; the codec is the same for every
    seed."""
    import torch
    from transformers import EncodecFeatureExtractor, GenerationConfig, MusicgenProcessor, T5Tokenizer

    from diverse_cfg.policies.musicgen.family import MUSICGEN as layout
    from diverse_cfg.policies.tensors import TensorSpec, write_safetensors

    folder.mkdir(parents=True)
    config = make_config(shape)
    shapes, _ = layout.expected_tensors(config)
    names = {name: index for index, name in enumerate(shapes)}

    def produce(name: str) -> torch.Tensor:
        own = 0 if name.startswith(layout.codec_prefix) else seed
        generator = torch.Generator().manual_seed(1000 * own + names[name])
        return torch.randn(shapes[name], generator=generator) * 0.02

    specs = [TensorSpec(name, torch.float32, size) for name, size in shapes.items()]
    write_safetensors(folder / "model.safetensors", specs, produce)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    GenerationConfig(guidance_scale=3.0, max_new_tokens=503).save_pretrained(folder)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    MusicgenProcessor(EncodecFeatureExtractor(), T5Tokenizer(vocab=vocab, extra_ids=0)).save_pretrained(
        folder
    )


def make_adapter(folder: Path, base: Path, seed: int) -> None:
    """A rank-16 adapter of the decoder's own projections."""
    import torch
    from peft import LoraConfig

    from diverse_cfg.policies.musicgen.family import MUSICGEN as layout
    from diverse_cfg.policies.tensors import TensorSpec, write_safetensors

    folder.mkdir(parents=True)
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    shapes, _ = layout.expected_tensors(layout.load_config(base))
    specs = []
    for name, size in shapes.items():
        if name.startswith("decoder.model.decoder.layers.") and name.split(".")[-2] in targets:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            specs.append(TensorSpec(f"{path}.lora_A.weight", torch.float32, (RANK, size[1])))
            specs.append(TensorSpec(f"{path}.lora_B.weight", torch.float32, (size[0], RANK)))
    sizes = {spec.name: spec.shape for spec in specs}
    generator = torch.Generator().manual_seed(seed)
    write_safetensors(
        folder / "adapter_model.safetensors",
        specs,
        lambda name: torch.randn(sizes[name], generator=generator) * 0.02,
    )
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets))
    config.base_model_name_or_path = str(base)
    config.save_pretrained(folder)


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_cache(files: list[Path]) -> None:
    """Ask the system to forget the files' pages (it may not, and says nothing)."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def measure_merge(experts: list[Path], output: Path) -> dict:
    """In a process of its own: seconds, and bytes that the process grew by."""
    from diverse_cfg.cli.memory import keep_freed_memory
    from diverse_cfg.merging import merge_checkpoints

    keep_freed_memory()  # as `diverse-cfg merge` does
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
    start = time.perf_counter()
    merge_checkpoints(experts, 0.5, output)
    return {"seconds": time.perf_counter() - start, "grown": resident("VmHWM") - before}


def measure_disk(inputs: list[Path], num_bytes: int, output: Path) -> float:
    """Seconds to read the inputs and to write as many bytes as the merged checkpoint has."""
    buffer = bytearray(_CHUNK)
    start = time.perf_counter()
    for file in inputs:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    with output.open("wb", buffering=0) as stream:
        for position in range(0, num_bytes, _CHUNK):
            stream.write(buffer[: min(_CHUNK, num_bytes - position)])
        os.fsync(stream.fileno())
    return time.perf_counter() - start


def measure(shape: str, root: Path, rounds: int) -> list[dict]:
    """One row per case: two full models, two adapters of one base."""
    make_checkpoint(root / "base", shape, 0)
    size = sum(file.stat().st_size for file in weights_of(root / "base"))
    rows = []
    for case in CASES:
        experts = [root / f"{case}-{seed}" for seed in (1, 2)]
        for seed, expert in enumerate(experts, start=1):
            make_checkpoint(expert, shape, seed) if case == "full" else make_adapter(
                expert, root / "base", seed
            )
        inputs = [
            f
            for folder in ([root / "base"] if case == "adapter" else []) + experts
            for f in weights_of(folder)
        ]
        seconds, disk, grown = [], [], []
        for _ in range(rounds):
            drop_cache(inputs)
            disk.append(measure_disk(inputs, size, root / "plain"))
            (root / "plain").unlink()
            drop_cache(inputs)
            command = [sys.executable, __file__, "--measure", *map(str, experts), str(root / "merged")]
            done = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            seconds.append(done["seconds"])
            grown.append(done["grown"])
            shutil.rmtree(root / "merged")
        for expert in experts:
            shutil.rmtree(expert)
        ratios = [a / b for a, b in zip(seconds, disk, strict=True)]
        rows.append(
            {
                "shape": shape,
                "experts": f"two {'full models' if case == 'full' else f'adapters of rank {RANK}'}",
                "checkpoint_gb": size / 1e9,
                "peak_gb": max(grown) / 1e9,
                "peak_checkpoints": max(grown) / size,
                "seconds": statistics.median(seconds),
                "disk_seconds": statistics.median(disk),
                "times_disk": statistics.median(ratios),
                "times_disk_spread": [min(ratios), max(ratios)],
            }
        )
    return rows


def environment() -> dict:
    """What the numbers were taken on."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": cpu,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": date.today().isoformat(),
    }


def as_table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| shape | experts | checkpoint, GB | grown by, GB | in checkpoints | time, s | disk alone, s | × "
        "disk (min – max) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["times_disk_spread"]
        lines.append(
            f"| {row['shape']} | {row['experts']} | {row['checkpoint_gb']:.2f} | {row['peak_gb']:.3f} | "
            f"{row['peak_checkpoints']:.3f} | {row['seconds']:.1f} | {row['disk_seconds']:.1f} | "
            f"{row['times_disk']:.2f} ({low:.2f} – {high:.2f}) |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description="Memory and time of merging.")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["tiny"])
    parser.add_argument("--rounds", type=int, default=3, help="disk and merge, taken in turns")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made (default: the system's)")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="JSON and Markdown"
    )
    parser.add_argument("--measure", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(measure_merge(list(args.measure[:2]), args.measure[2])))
        return
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    rows = []
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    for shape in args.shape:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="merge-benchmark-") as folder:
            rows += measure(shape, Path(folder), args.rounds)
    where = environment() | {"rounds": args.rounds}
    print(as_table(rows))
    if args.write:
        about = (__doc__ or "").split("\n\n")[2]
        text = f"# Merging, streamed\n\n{about}\n\n{as_table(rows)}\n\n"
        text += "\n".join(f"- {key}: {value}" for key, value in where.items()) + "\n"
        write_text(args.write / "merge.md", text)
        write_text(
            args.write / "merge.json", json.dumps({"environment": where, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
