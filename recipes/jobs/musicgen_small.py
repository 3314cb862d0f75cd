# /// script
# requires-python = ">=3.11"
# dependencies = ["diverse-cfg[eval]", "audiobox-aesthetics>=0.0.4"]
#
# [tool.uv.sources]
# diverse-cfg = { path = "../.." }
#
# [tool.uv]
# override-dependencies = ["torchaudio; sys_platform == 'never'", "submitit; sys_platform == 'never'"]
# ///
"""LoRA students of facebook/musicgen-small on one rented GPU of 24 GB, in one file: train, merge, measure, publish.

    uv run recipes/jobs/musicgen_small.py                          # ends with what would be published
    uv run recipes/jobs/musicgen_small.py --push user/name         # sends the merge, to a private repository
    uv run recipes/jobs/musicgen_small.py --smoke                  # the same on nano, on a CPU, in minutes

Hardware: one GPU of 24 GB, about 14 GB, about 6 h: quality student 2 h, diversity student 3.5 h, evaluation 20 min.
ESTIMATED from shapes, not measured. Run it again to go on where it stopped. What it measures is
`OUTPUT/results.md`, with the row that recipes/README.md asks for, and `OUTPUT/evaluation/`.

Where uv finds no clone (a hosted job), put the address of the wheel in the place of `path = "../.."`.
"""

import argparse
import json
import shlex
from pathlib import Path

import yaml

from diverse_cfg import __version__
from diverse_cfg.assets import recipe_path
from diverse_cfg.atomic import write_text
from diverse_cfg.cli import main as diverse_cfg
from diverse_cfg.settings import read_settings

# 128 clips a step, as the recipes, in parts that fit 24 GB.
CARD = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 8, "per_device_eval_batch_size": 16}
MEASURE = {
    "num_prompts": 64,
    "num_generations": 4,
    "text_encoder": "laion/larger_clap_general",  # never rewarded
    "aesthetics": True,
}
SMOKE = {
    **{"model_name_or_path": "nano", "dataset_name": "nano", "num_generations": 3, "clip_seconds": 1.0},
    **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 4},
    **{
        "max_steps": 2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": "false",
    },
    **{"report_to": "none", "use_cpu": "true"},
}
SMOKE_MEASURE = {
    **{"prompts": "nano", "num_prompts": 4, "num_generations": 2, "clip_seconds": 1.0, "teacher": "nano"},
    **{"judge": "nano", "reward_encoder": "nano", "heldout_encoder": "nano", "device": "cpu"},
}
STUDENTS = ("quality", "diversity")


def run(*words: object) -> None:
    """One command of diverse-cfg, which says on the screen what it is."""
    line = [str(word) for word in words]
    print(f"\n$ diverse-cfg {shlex.join(line)}", flush=True)
    if status := diverse_cfg(line):
        raise SystemExit(status)


def train(student: str, output: Path, smoke: bool) -> Path:
    """One student by its recipe; a finished one is left as it is, its card is written last."""
    folder = output / student
    if not (folder / "README.md").is_file():
        settings = {**(SMOKE if smoke else CARD), "output_dir": folder, "resume_from_checkpoint": "true"}
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        run("train", "--recipe", f"musicgen-small/{student}-lora", *flags)
    return folder


def evaluate(output: Path, merged: Path, smoke: bool) -> Path:
    """Base, guided base, students and merge on held-out prompts, by the recipe's protocol."""
    base = "nano" if smoke else "facebook/musicgen-small"
    settings = read_settings(recipe_path("musicgen-small/evaluate")) | (SMOKE_MEASURE if smoke else MEASURE)
    settings["systems"] = [
        {"name": "base", "model": base, "guidance_scale": [1, 3]},
        *({"name": student, "model": str(output / student)} for student in STUDENTS),
        {"name": "merge", "model": str(merged)},
    ]
    settings |= {"compare_to": ["base γ=3"], "output": str(output / "evaluation")}
    protocol = write_text(output / "evaluate.yaml", yaml.safe_dump(settings, allow_unicode=True))
    run("evaluate", "--config", protocol)
    return output / "evaluation"


def record(output: Path, evaluation: Path) -> Path:
    """The rows that recipes/README.md asks for, and the table of the evaluation."""
    import torch

    from diverse_cfg.evaluation.results import Results, markdown_table

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = []
    for student in STUDENTS:
        log = json.loads((output / student / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        last = {name: value for entry in log for name, value in entry.items()}
        hours, peak = last["train_runtime"] / 3600, last.get("memory/peak_gb")
        numbers = [f"{hours:.2f}", "–" if peak is None else f"{peak:.1f}", f"{last['kl/clip']:.3g}"]
        rows.append([f"musicgen-small/{student}-lora", __version__, "0", card, *numbers])
    header = [
        "recipe",
        "version",
        "seed",
        "hardware",
        "hours since it was last begun",
        "peak GB",
        "KL, nats per clip",
    ]
    tables = [markdown_table(header, rows), Results.load(evaluation).table()]
    return write_text(output / "results.md", "\n\n".join(tables) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/jobs/musicgen-small"), help="folder of the run"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="send the merge to this private repository")
    parser.add_argument("--smoke", action="store_true", help="two steps on nano, on a CPU")
    args = parser.parse_args(argv)
    students = [train(student, args.output, args.smoke) for student in STUDENTS]
    merged = args.output / "merged"
    if not (merged / "README.md").is_file():
        run("merge", *students, "--merge-weight", "0.5", "--output", merged)
    evaluation = evaluate(args.output, merged, args.smoke)
    print(record(args.output, evaluation).read_text(encoding="utf-8"))
    upload = ["--upload"] if args.push else []
    where = args.push or "user/musicgen-small-diverse-cfg"
    run("publish", merged, where, "--results", evaluation, "merge", *upload)


if __name__ == "__main__":
    main()
