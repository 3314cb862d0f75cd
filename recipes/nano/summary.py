"""Build RESULTS.md: what was found on the nano base, from the recorded numbers of both experiments; nothing is run.

    python recipes/nano/report.py

Reads `results/open` (prompts that leave something open) and `results/experiment` (prompts that name all), writes the
figures of the first beside it, RESULTS.md, and its first paragraph into the README.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from claims import Claim, at_equal_diversity, claims_table, registered_in, tested
from experiment import HERE, Experiment
from pages import write_section
from report import chosen_on, measured_by, names_of, number, only, table, tail, training_logs

from diverse_cfg.atomic import write_text
from diverse_cfg.evaluation.figures import front, merge_curve
from diverse_cfg.evaluation.levels import levels_of, of_levels
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Results, markdown_table
from diverse_cfg.evaluation.signatures import (
    FAILS,
    HOLDS,
    MISSING,
    OPEN,
    Arms,
    Signature,
    merges_of,
    signatures,
)

ANSWERS = {HOLDS: "yes", FAILS: "no", OPEN: "open", MISSING: "not measured"}
FEW = (1, 2)
"""How many attributes the prompts name on which the findings are tested first."""

COLUMNS = (
    "adherence",
    "clean_heldout",
    "clean_melody",
    "clean_rhythm",
    "clean_pitch",
    "clean_timbre",
    "dying",
)
LINE = "guidance on the base"
DRAWN = (LINE, "merges", "music", "students")


def findings(results: Results, arms: Arms, diversity: str = "clean_heldout") -> list[Signature]:
    """The paper's five findings, with the diversity of clean clips."""
    return signatures(results, arms, diversity=diversity)


def answers(columns: dict[str, list[Signature]]) -> str:
    """A Markdown table: a finding per row, a set of prompts per column."""
    first = next(iter(columns.values()))
    lines = [
        [f"{found.number}. {found.title}", *(f"**{ANSWERS[c[row].verdict]}**" for c in columns.values())]
        for row, found in enumerate(first)
    ]
    return markdown_table(["finding", *columns], lines)


def evidence(number: int, columns: dict[str, list[Signature]]) -> str:
    """The claims of one finding with their numbers."""
    claims = [column[number - 1].evidence for column in columns.values()]
    lines = []
    for row in zip(*claims, strict=True):
        cells = [
            ANSWERS[e.verdict] if e.found is None else f"{e.found.text()}: {ANSWERS[e.verdict]}" for e in row
        ]
        lines.append([row[0].claim, *cells])
    return markdown_table(["claim", *columns], lines)


def beside_line(results: Results, names: Iterable[str], columns: Sequence[str]) -> str:
    """Of every system adherence and diversity, and adherence minus guidance's where guidance is as diverse.

    Args:
        results: of a sweep.
        names: systems.
        columns: the diversities at which guidance is compared.
    """
    part = only(results, names)
    lines = []
    for row in part.systems:
        cells = [row.number("adherence").text(), row.number(columns[0]).text()]
        for x in columns:
            try:
                gap = at_equal_diversity(results, row.system.name, LINE, x, "adherence")
            except ValueError:
                cells.append("–")
                continue
            cells.append(f"**{gap.text()}**" if gap.excludes_zero else gap.text())
        rows = row.number("decoder_rows").estimate
        lines.append([row.system.name, *cells, "–" if rows is None else f"{rows:.0f}"])
    labels = [f"at equal {METRICS[x].label}" for x in columns]
    return markdown_table(["system", "adherence", METRICS[columns[0]].label, *labels, "decoder rows"], lines)


def by_level(results: Results, names: Sequence[str], metric: str) -> str:
    """One metric of some systems, a column per level."""
    levels = levels_of(results)
    parts = [of_levels(results, [level]) for level in levels]
    lines = [[name, *(part[name].number(metric).text() for part in parts)] for name in names]
    header = [f"{level} named ({len(part.prompts)})" for level, part in zip(levels, parts, strict=True)]
    return markdown_table(["system", *header], lines)


def training_costs(recorded: Path, runs: Sequence[dict[str, Any]]) -> str:
    """Updates, seconds per update and minutes of every arm."""
    logs = training_logs(recorded / "logs.csv")
    lines = []
    for arm, log in logs.items():
        own = [run for run in runs if run["arm"] == arm]
        minutes = sum(run["seconds"] for run in own) / len(own) / 60
        lines.append(
            [arm, str(len(own)), str(own[0]["steps"]), tail(log, "step_time", 1.0), f"{minutes:.0f}"]
        )
    return markdown_table(["arm", "seeds", "updates", "s per update", "minutes"], lines)


def draw(few: Results, four: Results, arms: Arms, folder: Path) -> None:
    """The figures: adherence against what differs, and the merge."""
    for part, mark in ((few, "few"), (four, "four")):
        shown = only(part, [name for series in DRAWN for name in names_of(part, series)])
        for facet in ("heldout", "melody", "rhythm"):
            front(shown, f"clean_{facet}", "adherence", folder / f"{facet}-{mark}")
    front(only(few, names_of(few, *DRAWN)), "dying", "adherence", folder / "dying-few")
    rows = [replace(row, system=replace(row.system, series=arms.merges)) for row in merges_of(few, arms)]
    merge_curve(
        replace(few, systems=rows), arms.merges, ["clean_heldout", "adherence"], folder / "merges-few"
    )


def build(recorded: Path, page: Path, readme: Path) -> None:
    """Write the figures into `recorded/open/test`, the page, and what the README repeats of it.

    Args:
        recorded: folder of both experiments' numbers.
        page: RESULTS.md.
        readme: has the section `finding`.
    """
    plan = Experiment.load(HERE / "open.yaml")
    folder = recorded / "open"
    found = {name: Results.load(folder / name) for name in plan.sweeps}
    test, arms = found["test"], Arms(**plan.sweeps["test"]["arms"])
    few, four = of_levels(test, FEW), of_levels(test, [4])
    closed = yaml.safe_load((HERE / "experiment.yaml").read_text(encoding="utf-8"))["sweeps"]["test"]["arms"]
    columns = {
        "1 or 2 named": findings(few, arms),
        "all levels": findings(test, arms),
        "4 named": findings(four, arms),
    }
    first = Results.load(recorded / "experiment" / "test")
    of_first = {"4 named, first experiment": findings(first, Arms(**closed), "diversity_heldout")}
    draw(few, four, arms, folder / "test")
    claims = registered_in(folder / "test")
    runs = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    environment = jinja2.Environment(  # noqa: S701 (Markdown of our own numbers)
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals |= {
        "table": table, "beside_line": beside_line, "by_level": by_level, "names_of": names_of, "evidence": evidence,
        "number": number, "gap": lambda a, b, part, y="adherence": part.difference(a, b, y).text(),
        "beside": lambda part, x: at_equal_diversity(part, arms.diverse, LINE, x, "adherence").text(),
    }  # fmt: skip
    text = environment.get_template("RESULTS.md.j2").render(
        arms=arms, test=test, few=few, four=four, found=found, columns=columns, runs=runs,
        answers=answers(columns | of_first),
        claims=claims_table(test, plan.claims, claims), claimed=claimed(test, plan.claims), COLUMNS=COLUMNS,
        chosen=chosen_on(found["validation"], "clean_heldout"), measured_by=measured_by(found, folder),
        costs=training_costs(folder, runs), hours=sum(run["seconds"] for run in runs) / 3600,
        commits=sorted({run["commit"] for run in runs}),
    )  # fmt: skip
    write_text(page, text)
    write_section(readme, "finding", text.split("\n\n")[1])


def claimed(results: Results, claims: Sequence[Claim]) -> dict[str, int]:
    """How many of the registered claims hold, stand open and fail."""
    verdicts = [row["verdict"] for row in tested(results, claims)]
    return {ANSWERS[name]: verdicts.count(name) for name in (HOLDS, FAILS, OPEN, MISSING)}
