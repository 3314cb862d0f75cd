"""The gates of the nano base, measured on test songs and held-out prompts; writes `results/gates.json` and pictures.

    python recipes/nano/verify.py --work runs/nano

Codec: does what can be heard survive `encode → decode`? Base: does guidance do to it what it does to MusicGen?
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from codec import LogMel, mel_error_db
from data import Clips
from judges import IGNORE, targets_of
from pages import write_section
from render import SAMPLE_RATE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from diverse_cfg.acoustics import validity
from diverse_cfg.assets import nano_path
from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep
from diverse_cfg.nano.judge import AttributeJudge
from diverse_cfg.nano.rules import classify, pitches
from diverse_cfg.policies.loading import load_policy


@torch.inference_mode()
def through_codec(codec, waveforms: torch.Tensor) -> torch.Tensor:
    parts = []
    for part in waveforms[:, None].split(32):
        encoded = codec.encode(part)
        parts.append(codec.decode(encoded.audio_codes, encoded.audio_scales)[0][:, 0])
    return torch.cat(parts)


def pitch_survival(real: torch.Tensor, decoded: torch.Tensor) -> dict[str, float]:
    """Frames voiced in both whose pitch stays within 50 cents."""
    before, after = (pitches(x, SAMPLE_RATE) for x in (real, decoded))
    both = np.isfinite(before) & np.isfinite(after)
    cents = 1200 * np.abs(np.log2(after[both] / before[both]))
    return {
        "pitch_within_50_cents": float((cents < 50).mean()),
        "voiced_share_kept": float(both.sum() / np.isfinite(before).sum()),
    }


def attribute_survival(real: torch.Tensor, decoded: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict:
    """Accuracy of judge and rules on real and on decoded clips, and how often the judge's verdict stays the same."""
    judge = AttributeJudge.from_pretrained(nano_path("judge"))
    table: dict[str, dict[str, float]] = {}
    for name, hear in (("judge", judge.classify), ("rules", classify)):
        before, after = hear(real, SAMPLE_RATE), hear(decoded, SAMPLE_RATE)
        for attribute in before:
            target = targets[attribute].numpy()
            known = target != IGNORE
            table[f"{name}_{attribute}"] = {
                "real": float((before[attribute] == target)[known].mean()),
                "codec": float((after[attribute] == target)[known].mean()),
                "same_verdict": float((before[attribute] == after[attribute]).mean()),
            }
    return table


def codec_gates(clips: Clips, count: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    codec = load_policy(nano_path()).audio_encoder.eval()
    index = np.linspace(0, len(clips) - 1, count).astype(int)
    real = clips.waveforms(index)
    decoded = through_codec(codec, real)
    gates = {"clips": count, "mel_error_db": mel_error_db(decoded, real), **pitch_survival(real, decoded)}
    gates["attributes"] = attribute_survival(real, decoded, targets_of(clips, index))
    sound = validity(decoded, SAMPLE_RATE)
    gates["validity"] = {name: float(value.double().mean()) for name, value in sound.items()}
    return gates, real, decoded


def base_gates(output: Path, prompts: int, clips: int) -> dict:
    """The shipped base at γ = 1 and γ = 3 on held-out prompts: paired differences over prompts."""
    config = SweepConfig(
        systems=[{"name": "base", "model": "nano"}, {"name": "guided", "model": "nano", "guidance_scale": 3.0}],
        output=str(output), num_prompts=prompts, num_generations=clips, compare_to=["base"], gallery_prompts=0,
    )  # fmt: skip
    sweep, systems = build_sweep(config)
    results = sweep.run(systems, config.compare_to)
    results.save(output)
    table = {}
    for metric in results.metrics:
        row = {s.system.name: results[s.system.name].metrics[metric].text() for s in results.usable}
        if metric in results["guided"].cells:
            row["difference"] = results.difference("guided", "base", metric).text()
        table[metric] = row
    return table


def gates_table(report: dict) -> str:
    """What is wanted and what was measured, as Markdown; a missed gate is bold."""

    def row(what: str, wanted: str, value: str, met: bool | None = None) -> str:
        return f"| {what} | {wanted} | {value if met in (None, True) else f'**{value}**'} |"

    codec, base = report["codec"], report["base"]
    heard = codec["attributes"]
    tempo = heard["judge_tempo"]["codec"] / heard["judge_tempo"]["real"]
    same = heard["judge_instrument"]["same_verdict"]
    pitch = codec["pitch_within_50_cents"]

    def survival(judge: str, *attributes: str) -> str:
        pairs = [heard[f"{judge}_{name}"] for name in attributes]
        return ", ".join(f"{pair['real']:.3f} → {pair['codec']:.3f}" for pair in pairs)

    mel, validity = codec["mel_error_db"], codec["validity"]
    lines = [
        f"Codec, `encode → decode` on {codec['clips']} clips of test songs; the judge learnt from training songs, half",
        "of the clips real and half through the codec, none of them from a model; the rules use no network:",
        "",
        "| | wanted | measured |",
        "|---|---|---|",
        row("mel error (80 bands, floor −80 dB)", "≤ 3 dB", f"{mel:.3f} dB", mel <= 3),
        row("instrument, judge: same verdict", "≥ 95 %", f"{same:.1%}", same >= 0.95),
        row(
            "tempo, judge: real → codec",
            "≥ 90 %",
            f"{survival('judge', 'tempo')} ({tempo:.1%})",
            tempo >= 0.9,
        ),
        row("register, key, judge: real → codec", "", survival("judge", "register", "key")),
        row("tempo, register, key, rules: real → codec", "", survival("rules", "tempo", "register", "key")),
        row("pitch within 50 cents, jointly voiced frames", "≥ 90 %", f"{pitch:.1%}", pitch >= 0.9),
        row("voiced frames that stay voiced", "", f"{codec['voiced_share_kept']:.1%}"),
        row("level (real clips: −20 dBFS)", "", f"{validity['level_dbfs']:.1f} dBFS"),
        row("clipped samples", "", f"{validity['clipped_fraction']:.0%}"),
        "",
        f"Base, {report['prompts']} held-out prompts × 8 clips, sampling seed 0, 95 % intervals over prompts:",
        "",
        "| | γ = 1 | γ = 3 | difference |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {metric} | {found['base']} | {found['guided']} | {found.get('difference', '')} |"
        for metric, found in base.items()
    ]
    return "\n".join(lines)


def curves_table(results: Path) -> str:
    """The three trainings side by side; rows that double, so that a flat end shows."""
    columns = (
        ("vocoder", "mel_error_db", "vocoder: mel error, dB"),
        ("encoder", "validation_loss", "encoder: error (features' variance = 1)"),
        ("language_model", "validation_loss", "language model: validation loss, nats"),
    )
    curves = []
    for name, metric, _ in columns:
        with (results / f"{name}.csv").open(newline="") as file:
            curves.append({int(row["step"]): float(row[metric]) for row in csv.DictReader(file)})
    steps = sorted({step for curve in curves for step in curve})
    last = {max(curve) for curve in curves}
    shown = [
        step for step in steps if step in last or step in (500, 1000, 2000, 4000, 8000) or step % 4000 == 0
    ]
    lines = ["| step | " + " | ".join(label for _, _, label in columns) + " |", "|---|---|---|---|"]
    for step in shown:
        lines.append(
            f"| {step} | " + " | ".join(f"{c[step]:.3f}" if step in c else "" for c in curves) + " |"
        )
    return "\n".join(lines)


def draw_spectrograms(rows: dict[str, torch.Tensor], path: Path) -> None:
    """Log-mel spectrograms, one row of clips per kind."""
    mel = LogMel(1024, 160, 96)
    columns = len(next(iter(rows.values())))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(3 * columns, 2.2 * len(rows)), sharex=True, sharey=True
    )
    for line, (name, clips) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, mel(clips), strict=True):
            axis.imshow(
                image.T, origin="lower", aspect="auto", cmap="magma", vmin=-9, vmax=-2, extent=(0, 3, 0, 96)
            )
        line[0].set_ylabel(f"{name}\nmel band")
    for axis in axes[-1]:
        axis.set_xlabel("s")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/nano"), help="folder of the build")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--clips", type=int, default=400, help="test clips for the codec")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts for the base, 8 clips each")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    codec, real, decoded = codec_gates(Clips(arguments.work / "audio" / "test"), arguments.clips)
    base = base_gates(arguments.work / "gates", arguments.prompts, 8)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    report = {
        "codec": codec, "base": base, "prompts": arguments.prompts, "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    (arguments.output / "gates.json").write_text(json.dumps(report, indent=2) + "\n")
    json.dump(report, sys.stdout, indent=2)
    draw_spectrograms({"real": real[:6], "decoded": decoded[:6]}, arguments.output / "codec.png")
    for name in ("vocoder", "encoder", "language_model"):
        shutil.copyfile(arguments.work / f"{name}.csv", arguments.output / f"{name}.csv")
    page = Path(__file__).with_name("README.md")
    write_section(page, "gates", gates_table(report))
    write_section(page, "curves", curves_table(arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
