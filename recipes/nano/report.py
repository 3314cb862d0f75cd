"""Build RESULTS.md, every table and every figure of the experiment from the recorded numbers; nothing is run.

    python recipes/nano/report.py

Reads `results/experiment` (what `experiment.py` recorded), writes the figures beside it and RESULTS.md here.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from pages import write_section

from diverse_cfg.atomic import write_text
from diverse_cfg.evaluation.curves import Log, draw_curves
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.report import draw
from diverse_cfg.evaluation.results import Estimate, Results, mean_estimate
from diverse_cfg.evaluation.signatures import Arms, Signature, signatures, to_markdown

HERE = Path(__file__).parent
RECORDED = HERE / "results" / "experiment"
COLUMNS = (
    "adherence", "rules", "diversity_heldout", "diversity_reward", "vendi_heldout", "kl_teacher", "policy_entropy",
    "validity", "decoder_rows",
)  # fmt: skip
JUDGED = {"overdone": "β = 400", "overdone-guarded": "β = 400 with guards"}
FRONT = (
    "guidance on the base", "guidance and temperature on the base", "merges", "students",
    "temperature on the quality student", "temperature on the diversity student", "uniform average",
)  # fmt: skip
# Logged while training, in every seed; then measured on test prompts with the weights kept along the first.
CURVES = (
    ("kl/clip", "KL to the teacher (nats)"), ("reward/diversity", "diversity (reward)"),
    ("adherence", "prompt adherence"), ("diversity_heldout", "diversity (held-out)"),
)  # fmt: skip
LABELS = {"quality": "β = 0 from the base", **{f"beta-{b}": f"β = {b}" for b in (0, 20, 40, 80, 120)}}


def table(results: Results, names: Iterable[str], columns: Sequence[str] = COLUMNS) -> str:
    """A Markdown table of some systems; failures and flags are in it."""
    part = only(results, names)
    return part.table([name for name in columns if name in part.metrics])


def only(results: Results, names: Iterable[str]) -> Results:
    """The results of some systems."""
    wanted = set(names)
    rows = [row for row in results.systems if row.system.name in wanted]
    return Results(results.prompts, rows, results.settings)


def differences(results: Results, pairs: Iterable[tuple[str, str]], columns: Sequence[str]) -> str:
    """Paired differences with intervals, a row per pair; bold where zero is outside."""
    lines = [
        "| first − second | " + " | ".join(METRICS[c].label for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for first, second in pairs:
        cells = []
        for column in columns:
            try:
                found = results.difference(first, second, column)
            except ValueError:  # one of the two failed or was not evaluated
                cells.append("–")
                continue
            cells.append(f"**{found.text()}**" if found.excludes_zero else found.text())
        lines.append(f"| {first} − {second} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def training_logs(path: Path) -> dict[str, list[Log]]:
    """Arm → logs of its seeds, from the recorded CSV."""
    logs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            entry = {k: float(v) for k, v in row.items() if k not in ("arm", "seed") and v}
            logs.setdefault((row["arm"], row["seed"]), []).append(entry)
    arms: dict[str, list[Log]] = {}
    for (arm, _), log in logs.items():
        arms.setdefault(arm, []).append(log)
    return arms


def tail(logs: Sequence[Log], metric: str, share: float = 0.25) -> str:
    """Mean over seeds of a metric's last quarter ± the standard deviation over seeds; a negative share is its first."""
    means = []
    for log in logs:
        values = [entry[metric] for entry in log if metric in entry]
        count = max(1, round(abs(share) * len(values)))
        if values:
            means.append(np.mean(values[-count:] if share > 0 else values[:count]))
    if not means:
        return "–"
    return f"{np.mean(means):.3g}" + (f" ± {np.std(means, ddof=1):.1g}" if len(means) > 1 else "")


def training_table(arms: dict[str, list[Log]]) -> str:
    """What the trainings logged in their last quarter, and the divergence of their first steps."""
    columns = (
        ("kl/clip", "KL, nats per clip"), ("reward/diversity", "diversity (reward)"),
        ("reward/diversity_variance", "Var(r) within prompts"), ("entropy/codebook_0", "entropy, codebook 0"),
        ("grad_norm/distillation", "gradient of the KL (norm)"), ("grad_norm/policy_gradient", "of the policy term"),
        ("step_time", "s per step"),
    )  # fmt: skip
    lines = [
        "| arm | seeds | KL at first | " + " | ".join(label for _, label in columns) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for arm, logs in arms.items():
        cells = [tail(logs, "kl/clip", -0.01), *(tail(logs, name) for name, _ in columns)]
        lines.append(f"| {LABELS.get(arm, arm)} | {len(logs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def alarms(runs: Sequence[dict[str, Any]], arms: dict[str, list[Log]]) -> str:
    """What every judged run evaluated, step by step, and the alarms that rang."""
    columns = (
        ("eval_kl/clip", "KL, nats per clip"), ("eval_reward/diversity", "diversity (reward)"),
        ("eval_reward/monitor_diversity", "diversity (second encoder)"), ("eval_rewards/adherence/mean", "adherence"),
    )  # fmt: skip
    lines = ["| run | step | " + " | ".join(label for _, label in columns) + " | alarms |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for run in runs:
        for entry in arms[run["arm"]][0]:
            if run["arm"] in JUDGED and columns[0][0] in entry:
                rang = [message.partition(":")[0] for step, message in run["alarms"] if step == entry["step"]]
                numbers = [f"{entry[name]:.3g}" for name, _ in columns]
                cells = [JUDGED[run["arm"]], f"{entry['step']:.0f}", *numbers, ", ".join(rang) or "–"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chosen_on(validation: Results, x: str = "diversity_heldout", y: str = "adherence") -> str | None:
    """The most diverse student that keeps at least half of what guidance gains in quality; None if none does."""
    base, guided = (np.nanmean(validation[f"base γ={scale}"].cells[y]) for scale in (1, 3))
    students = [row for row in validation.usable if row.system.series == "β" and not row.flags]
    kept = [row for row in students if np.nanmean(row.cells[y]) >= (base + guided) / 2]
    return max(kept, key=lambda row: np.nanmean(row.cells[x])).system.name if kept else None


def verdicts(columns: dict[str, Sequence[Signature]]) -> str:
    """A Markdown table of the findings, a column of verdicts for each way of measuring."""
    lines = ["| finding | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in zip(*columns.values(), strict=True):
        cells = [f"**{signature.verdict}**" for signature in row]
        lines.append(f"| {row[0].number}. {row[0].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def names_of(results: Results, *series: str) -> list[str]:
    return [
        row.system.name for row in results.systems if row.system.series in series or row.system.name in series
    ]


def at_equal_diversity(
    results: Results, system: str, sweep: str, x: str = "diversity_heldout", y: str = "adherence"
) -> Estimate | None:
    """Quality of a system minus that of a sweep where it has the same diversity (linear between its points)."""
    rows = [row for row in results.usable if row.system.series == sweep and not row.flags]
    if len(rows) < 2 or system not in {row.system.name for row in results.usable}:
        return None
    order = np.argsort([np.nanmean(row.cells[x]) for row in rows])
    places = [float(np.nanmean(rows[i].cells[x])) for i in order]
    wanted = float(np.nanmean(results[system].cells[x]))
    if not places[0] <= wanted <= places[-1]:
        return None
    shares = [np.interp(wanted, places, np.eye(len(rows))[k]) for k in range(len(rows))]
    line = sum(
        share * rows[i].cells[y].mean(1, keepdims=True) for share, i in zip(shares, order, strict=True)
    )
    return mean_estimate(results[system].cells[y] - line)


def measured_along(trajectories: Results) -> dict[str, Log]:
    """Label of an arm → what was measured of the weights kept along it, as a log; step 0 is what it started from."""
    measured: dict[str, dict[str, float]] = {
        row.system.name: {name: float(np.nanmean(row.cells[name])) for name, _ in CURVES if name in row.cells}
        for row in trajectories.usable
    }
    logs: dict[str, list[dict[str, Any]]] = {}
    start = "base"  # of the first arm; all others start from its end
    for label in LABELS.values():
        series = label.replace(" = ", "=")
        kept = [row.system for row in trajectories.usable if row.system.series == series and row.system.step]
        if kept and start in measured:
            logs[label] = [{"step": 0} | measured[start]]
            logs[label] += [{"step": system.step} | measured[system.name] for system in kept]
        if label == LABELS["quality"]:
            start = kept[-1].name if kept else ""
    return logs


def draw_training(recorded: Path, page: Path) -> dict[str, list[Log]]:
    """Draw the curves of the main arms, write their table into the section `training` of `page`; returns all logs."""
    arms = training_logs(recorded / "logs.csv")
    main = {LABELS[arm]: logs for arm, logs in arms.items() if arm in LABELS}
    measured = {}
    if (recorded / "trajectories" / "metrics.json").is_file():
        measured = measured_along(Results.load(recorded / "trajectories"))
    curves = {label: [*logs, measured.get(label, [])] for label, logs in main.items()}
    draw_curves(curves, recorded / "training", CURVES, smooth=25)
    write_section(page, "training", training_table({arm: arms[arm] for arm in arms if arm in LABELS}))
    return arms


def build(recorded: Path, page: Path, recipes: Path, readme: Path) -> None:
    """Write the figures into `recorded`, the page to `page`, a table each into `recipes` and `readme`."""
    arms = draw_training(recorded, recipes)
    found = {path.parent.name: Results.load(path.parent) for path in sorted(recorded.glob("*/metrics.json"))}
    if "test" not in found:
        raise FileNotFoundError(f"{recorded} has no test sweep: run experiment.py first")
    runs = json.loads((recorded / "runs.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((HERE / "experiment.yaml").read_text(encoding="utf-8"))
    test = found["test"]
    draw(only(test, names_of(test, *FRONT)), recorded / "test")
    for name in ("trajectories", "hacking"):
        if name in found:
            draw(found[name], recorded / name)
    parts = Arms(
        **settings["sweeps"]["test"]["arms"] | {"sweeps": tuple(settings["sweeps"]["test"]["arms"]["sweeps"])}
    )
    held_out, rewarded = signatures(test, parts), signatures(test, parts, diversity="diversity_reward")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals |= {
        "table": table, "differences": differences, "names_of": names_of, "at_equal_diversity": at_equal_diversity,
        "training_table": training_table, "alarms": alarms, "chosen_on": chosen_on,
    }  # fmt: skip
    text = environment.get_template("RESULTS.md.j2").render(
        found=found, test=test, runs=runs, arms=arms, parts=parts,
        verdicts=verdicts({"held-out encoder": held_out, "encoder of the reward": rewarded}),
        held_out=to_markdown(held_out), rewarded=to_markdown(rewarded),
        hours=sum(run["seconds"] for run in runs) / 3600,
        commits=sorted({run["commit"] for run in runs}),
        seeds={run["seed"] for run in runs if run["arm"] == "beta-80"},
    )  # fmt: skip
    write_text(page, text)
    shown = [parts.base, parts.guided, parts.quality, "LERP λ=0.5", parts.diverse]
    write_section(readme, "results", table(test, shown, ("adherence", "diversity_heldout", "decoder_rows")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recorded", type=Path, default=RECORDED)
    parser.add_argument("--page", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--recipes", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--readme", type=Path, default=HERE.parents[1] / "README.md")
    arguments = parser.parse_args(argv)
    build(arguments.recorded, arguments.page, arguments.recipes, arguments.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
