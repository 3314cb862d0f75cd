"""Build every page, table and figure of the experiments from the recorded numbers; nothing is run.

    python recipes/nano/report.py

Reads `results/experiment` (what `experiment.py` recorded) and writes its figures and its page there; then RESULTS.md,
the page on open prompts (`summary.py`).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from pages import write_section

from diverse_cfg.atomic import write_text
from diverse_cfg.evaluation.figures import front, merge_curve, trajectories
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Estimate, Results, markdown_table, mean_estimate
from diverse_cfg.evaluation.signatures import (
    Arms,
    Signature,
    members,
    merges_of,
    signatures,
    useful_corner,
)
from diverse_cfg.evaluation.systems import System
from diverse_cfg.plotting import Log, draw_curves

HERE = Path(__file__).parent
RECORDED = HERE / "results" / "experiment"
COLUMNS = (
    "adherence", "rules", "diversity_heldout", "diversity_reward", "vendi_heldout", "kl_teacher", "policy_entropy",
    "codebook0_entropy", "validity", "decoder_rows",
)  # fmt: skip
JUDGED = {"overdone": "β = 400", "overdone-guarded": "β = 400 with guards"}
FRONT = (
    "merges", "guidance on the base", "guidance and temperature on the base", "guidance on the quality student",
    "temperature on the quality student", "students", "uniform average",
)  # fmt: skip
# Ways of measuring: (quality, diversity). The first is the one that was registered before anything was measured.
WAYS = {
    "held-out encoder, judge": ("adherence", "diversity_heldout"),
    "held-out encoder, rules": ("rules", "diversity_heldout"),
    "encoder of the reward, judge": ("adherence", "diversity_reward"),
    "encoder of the reward, rules": ("rules", "diversity_reward"),
}
MOST_DYING = 0.02
ONE_SEED = " ¹"
ONE_SEED_NOTE = "¹ One training seed: this run only; the interval is over prompts alone."
# Logged while training, in every seed; then measured on test prompts with the weights kept along the first.
CURVES = (
    ("kl/clip", "KL to the teacher (nats)"), ("reward/diversity", "diversity (reward)"),
    ("adherence", "prompt adherence"), ("diversity_heldout", "diversity (held-out)"),
)  # fmt: skip
LABELS = {"quality": "β = 0 from the base", **{f"beta-{b}": f"β = {b}" for b in (0, 20, 40, 80, 120)}}


def table(results: Results, names: Iterable[str], columns: Sequence[str] = COLUMNS) -> str:
    """A Markdown table of some systems; failures, flags and students of a single seed are marked."""
    part = only(results, names)
    marks = {row.system.name: mark(row.system) for row in part.systems}
    part.systems = [
        replace(row, system=replace(row.system, name=row.system.name + marks[row.system.name]))
        for row in part.systems
    ]
    text = part.table([name for name in columns if name in part.metrics])
    return f"{text}\n\n{ONE_SEED_NOTE}" if any(marks.values()) else text


def mark(system: System) -> str:
    """The footnote's sign of what was trained, and with one seed only."""
    return ONE_SEED if system.role in ("student", "merge") and len(system.replicates) == 1 else ""


def only(results: Results, names: Iterable[str]) -> Results:
    """The results of some systems."""
    wanted = set(names)
    rows = [row for row in results.systems if row.system.name in wanted]
    return Results(results.prompts, rows, results.settings)


def differences(results: Results, pairs: Iterable[tuple[str, str]], columns: Sequence[str]) -> str:
    """Paired differences with intervals, a row per pair; bold where zero is outside; single seeds are marked."""
    marks = {row.system.name: mark(row.system) for row in results.systems}
    lines = []
    for first, second in pairs:
        cells = []
        for column in columns:
            try:
                found = results.difference(first, second, column)
            except ValueError:  # one of the two failed or was not evaluated
                cells.append("–")
                continue
            cells.append(f"**{found.text()}**" if found.excludes_zero else found.text())
        marked = marks.get(first) or marks.get(second) or ""
        lines.append([f"{first} − {second}{marked}", *cells])
    text = markdown_table(["first − second", *(METRICS[c].label for c in columns)], lines)
    return f"{text}\n\n{ONE_SEED_NOTE}" if ONE_SEED in text else text


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


def training_table(arms: dict[str, list[Log]], forward: Sequence[str] = ()) -> str:
    """What the trainings logged in their last quarter, and the divergence of their first steps.

    Args:
        arms: arm → logs of its seeds.
        forward: arms that minimise, and therefore log, KL(teacher ‖ student).
    """
    columns = (
        ("kl/clip", "KL, nats per clip"), ("reward/diversity", "diversity (reward)"),
        ("reward/diversity_variance", "Var(r) within prompts"), ("entropy/codebook_0", "entropy, codebook 0"),
        ("grad_norm/distillation", "gradient of the KL (norm)"), ("grad_norm/policy_gradient", "of the policy term"),
        ("step_time", "s per step"),
    )  # fmt: skip
    lines = []
    for arm, logs in arms.items():
        cells = [tail(logs, "kl/clip", -0.01), *(tail(logs, name) for name, _ in columns)]
        if arm in forward:
            cells[:2] = [f"{cell} (forward)" for cell in cells[:2]]
        lines.append([LABELS.get(arm, arm), str(len(logs)), *cells])
    return markdown_table(["arm", "seeds", "KL at first", *(label for _, label in columns)], lines)


def alarms(runs: Sequence[dict[str, Any]], arms: dict[str, list[Log]]) -> str:
    """What every judged run evaluated, step by step, and the alarms that rang."""
    columns = (
        ("eval_kl/clip", "KL, nats per clip"), ("eval_reward/diversity", "diversity (reward)"),
        ("eval_reward/monitor_diversity", "diversity (second encoder)"), ("eval_rewards/adherence/mean", "adherence"),
    )  # fmt: skip
    lines = []
    for run in runs:
        for entry in arms[run["arm"]][0]:
            if run["arm"] in JUDGED and columns[0][0] in entry:
                rang = [message.partition(":")[0] for step, message in run["alarms"] if step == entry["step"]]
                numbers = [f"{entry[name]:.3g}" for name, _ in columns]
                lines.append([JUDGED[run["arm"]], f"{entry['step']:.0f}", *numbers, ", ".join(rang) or "–"])
    return markdown_table(["run", "step", *(label for _, label in columns), "alarms"], lines)


def chosen_on(validation: Results, x: str = "diversity_heldout", y: str = "adherence") -> str | None:
    """The most diverse student that keeps at least half of what guidance gains in quality; None if none does.

    Where dying clips were counted, no more than 2 % of its clips may be such.
    """
    base, guided = (np.nanmean(validation[f"base γ={scale}"].cells[y]) for scale in (1, 3))
    students = [row for row in validation.usable if row.system.series == "β" and not row.flags]
    students = [row for row in students if "dying" not in row.cells or row.mean("dying") <= MOST_DYING]
    kept = [row for row in students if np.nanmean(row.cells[y]) >= (base + guided) / 2]
    return max(kept, key=lambda row: np.nanmean(row.cells[x])).system.name if kept else None


Found = dict[str, dict[str, list[Signature]]]
"""Diversity student → way of measuring → the findings."""


def verdicts(found: Found) -> str:
    """A Markdown table of the findings: a row per diversity student, a column of verdicts per way of measuring."""
    ways = next(iter(found.values()))
    lines = []
    for index, titled in enumerate(next(iter(ways.values()))):
        rows = {student: [way[index] for way in by_way.values()] for student, by_way in found.items()}
        for student, row in _once(rows).items():
            cells = [f"**{signature.verdict}**" for signature in row]
            lines.append([f"{titled.number}. {titled.title}", student, *cells])
    return markdown_table(["finding", "diversity student", *ways], lines)


def evidence(found: Found) -> str:
    """Of every finding a Markdown table: its claims, with each diversity student and way of measuring."""
    ways = next(iter(found.values()))
    parts = []
    for index, titled in enumerate(next(iter(ways.values()))):
        lines: list[list[str]] = []
        for place, claim in enumerate(titled.evidence):
            rows = {s: [way[index].evidence[place] for way in by_way.values()] for s, by_way in found.items()}
            for student, row in _once(rows).items():
                cells = [e.verdict if e.found is None else f"{e.found.text()}: {e.verdict}" for e in row]
                lines.append([claim.claim, student, *cells])
        table = markdown_table(["claim", "diversity student", *ways], lines)
        parts.append(f"### {titled.number}. {titled.title}\n\n{table}\n")
    return "\n".join(parts)


def _once(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The rows, or one alone where no student makes a difference."""
    first = next(iter(rows.values()))
    return {"any": first} if len(rows) > 1 and all(row == first for row in rows.values()) else rows


def corners(results: Results, arms: Arms, x: str, y: str) -> str:
    """How far the verdict on hypervolumes depends on where they begin, as a Markdown table."""
    pools = {
        "guidance on the base": ("guidance on the base",),
        "all sweeps that were measured": pooled(results, arms),
        "the students of each β": ("students",),
    }
    try:
        front = [row.system.name for row in merges_of(results, arms)]
        near = useful_corner(results, arms, x, y)
        last = min(
            results.usable,
            key=lambda row: row.metrics[x].estimate if x in row.metrics and not row.flags else 9,
        )
        least = last.mean(x)
        named = {
            f"diversity of {arms.guided}, quality of {arms.base}: the claim's": near,
            f"diversity of {last.system.name}, the least; quality of {arms.base}": (least, near[1]),
            "the worst of all systems in the sweep: the first pages'": results.worst(x, y),
            f"diversity of {last.system.name}; 0.1 less quality than {arms.base}": (least, near[1] - 0.1),
            "no diversity, quality 0.5": (0.0, 0.5),
            "no diversity, no quality": (0.0, 0.0),
        }
    except (ValueError, KeyError):
        return "Not measured."
    lines = []
    for name, corner in named.items():
        cells = []
        for pool in pools.values():
            try:
                found = results.hypervolume_difference(front, members(results, pool), x, y, corner)
                cells.append(f"**{found.text()}**" if found.excludes_zero else found.text())
            except ValueError:
                cells.append("not measured")
        lines.append([name, f"({corner[0]:.3f}, {corner[1]:.3f})", *cells])
    return markdown_table(["hypervolume above", "at", *(f"merges − {name}" for name in pools)], lines)


def pooled(results: Results, arms: Arms) -> list[str]:
    """Every series of the sweeps that was measured."""
    there = {name for row in results.usable for name in (row.system.name, row.system.series) if not row.flags}
    return [name for name in dict.fromkeys(itertools.chain(*arms.pools.values())) if name in there]


def dominated(results: Results, arms: Arms, x: str, y: str) -> str:
    """Which points of the sweeps lie below and to the left of a merge, by their means."""

    def mean(name: str) -> tuple[float, float]:
        row = results[name]  # rounded: the same clips must not beat themselves by an order of summation
        return round(row.mean(x), 9), round(row.mean(y), 9)

    def beats(first: str, second: str) -> bool:
        (x1, y1), (x2, y2) = mean(first), mean(second)
        return x1 >= x2 and y1 >= y2 and (x1, y1) != (x2, y2)

    merges = [row.system.name for row in merges_of(results, arms)]
    beaten: dict[str, list[str]] = {}
    for point in members(results, pooled(results, arms)):
        if point not in merges:
            beaten[point] = [merge for merge in merges if beats(merge, point)]
    lines = [f"- {point}: {', '.join(by)}" for point, by in beaten.items() if by]
    none = [point for point, by in beaten.items() if not by]
    return "\n".join([*lines, f"- by no merge: {', '.join(none) or '–'}"])


def number(results: Results, system: str, metric: str) -> str:
    """One number as text; a dash where it was not measured."""
    rows = [row for row in results.usable if row.system.name == system]
    return rows[0].number(metric).text() if rows else "–"


def ratio(results: Results, first: str, second: str, metric: str) -> str:
    """How many times the first's mean the second's is; a dash where one was not measured."""
    values = [results[name].number(metric).estimate for name in (first, second)]
    return f"a factor of {values[0] / values[1]:.1f}" if values[0] and values[1] else "–"


def measured_by(found: dict[str, Results], recorded: Path) -> str:
    """A Markdown table of the sweeps: how much was played, at which commit, on which machine."""
    lines = []
    for name, results in found.items():
        settings, path = results.settings, recorded / name / "run.json"
        run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        size = f"{len(results.prompts)} × {len(settings['seeds'])} × {settings['num_generations']}"
        machine = run.get("machine") or settings.get("machine", "not recorded")
        lines.append([name, size, run.get("commit", "not recorded"), machine])
    return markdown_table(["sweep", "prompts × sampling seeds × clips", "commit", "machine"], lines)


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
    wanted = results[system].mean(x)
    if not places[0] <= wanted <= places[-1]:
        return None
    shares = [np.interp(wanted, places, np.eye(len(rows))[k]) for k in range(len(rows))]
    line = sum(
        share * rows[i].cells[y].mean(1, keepdims=True) for share, i in zip(shares, order, strict=True)
    )
    return mean_estimate(results[system].cells[y] - line)


def measured_along(along: Results) -> dict[str, Log]:
    """Label of an arm → what was measured of the weights kept along it, as a log; step 0 is what it started from."""
    measured: dict[str, dict[str, Any]] = {
        row.system.name: {name: row.mean(name) for name, _ in CURVES if name in row.cells}
        | ({"flagged": True} if row.flags else {})
        | {"system": row.system.name}
        for row in along.usable
    }
    logs: dict[str, list[dict[str, Any]]] = {}
    start = "base"  # of the first arm; all others start from its end
    for label in LABELS.values():
        series = label.replace(" = ", "=")
        kept = [row.system for row in along.usable if row.system.series == series and row.system.step]
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


def draw(found: dict[str, Results], arms: Arms, recorded: Path) -> None:
    """The figures of the sweeps: front and LERP of the test sweep, paths of the others."""
    x, y = "diversity_heldout", "adherence"
    test = found["test"]
    shown = [name for series in FRONT for name in names_of(test, series)]
    by_name = {row.system.name: row for row in test.systems}
    drawn = Results(test.prompts, [by_name[name] for name in dict.fromkeys(shown)], test.settings)
    front(drawn, x, y, recorded / "test" / "front", useful_corner(test, arms, x, y))
    merge_curve(test, arms.merges, [x, y], recorded / "test" / "lerp-merges")
    if "trajectories" in found:
        starts = {
            label.replace(" = ", "="): log[0]["system"]
            for label, log in measured_along(found["trajectories"]).items()
        }
        trajectories(found["trajectories"], x, y, recorded / "trajectories" / "trajectories", starts)
    if "hacking" in found:
        steps = any(row.system.step is not None for row in found["hacking"].usable)
        if steps:
            trajectories(found["hacking"], x, y, recorded / "hacking" / "trajectories")


def build(recorded: Path, page: Path, recipes: Path) -> None:
    """Write the figures into `recorded`, the page to `page`, and a table into `recipes`."""
    arms = draw_training(recorded, recipes)
    found = {path.parent.name: Results.load(path.parent) for path in sorted(recorded.glob("*/metrics.json"))}
    if "test" not in found:
        raise FileNotFoundError(f"{recorded} has no test sweep: run experiment.py first")
    runs = json.loads((recorded / "runs.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((HERE / "experiment.yaml").read_text(encoding="utf-8"))
    test = found["test"]
    chosen = settings["sweeps"]["test"]["arms"]
    arms_of = {a["diverse"]: Arms(**a) for a in (chosen, chosen | settings["far_end"])}
    far = arms_of[settings["far_end"]["diverse"]]
    findings = {
        student: {way: signatures(test, a, quality=y, diversity=x) for way, (y, x) in WAYS.items()}
        for student, a in arms_of.items()
    }
    forward = [
        name
        for name, arm in settings["arms"].items()
        if arm.get("settings", {}).get("divergence") == "forward_kl"
    ]
    draw(found, far, recorded)
    environment = jinja2.Environment(  # noqa: S701 (Markdown of our own numbers)
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals |= {
        "table": table, "differences": differences, "names_of": names_of, "at_equal_diversity": at_equal_diversity,
        "training_table": training_table, "alarms": alarms, "chosen_on": chosen_on, "corners": corners,
        "dominated": dominated, "number": number, "ratio": ratio,
    }  # fmt: skip
    text = environment.get_template("experiment.md.j2").render(
        found=found, test=test, runs=runs, arms=arms, far=far, chosen=chosen["diverse"], forward=forward,
        verdicts=verdicts(findings), evidence=evidence(findings), measured_by=measured_by(found, recorded),
        hours=sum(run["seconds"] for run in runs) / 3600,
        commits=sorted({run["commit"] for run in runs}),
        seeds={run["seed"] for run in runs if run["arm"] == "beta-80"},
    )  # fmt: skip
    write_text(page, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    import summary

    build(RECORDED, RECORDED / "README.md", HERE.parent / "README.md")
    summary.build(RECORDED.parent, HERE / "RESULTS.md", HERE.parents[1] / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
