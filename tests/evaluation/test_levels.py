"""Results by level: how many attributes a prompt names."""

import csv

import numpy as np
import pytest

from diverse_cfg.evaluation.levels import level_frame, level_tables, levels_of, of_levels, save_levels
from diverse_cfg.evaluation.results import Estimate, Results
from diverse_cfg.nano.attributes import ATTRIBUTES
from diverse_cfg.nano.rules import scores_of
from tests.evaluation.test_results import row

PROMPTS = [
    "violin solo",
    "a slow tune on a piano",
    "flute melody",
    "a fast low melody in D minor on an organ",
]


def results(prompts=PROMPTS):
    cells = {
        "adherence": np.array([[1.0], [0.5], [0.0], [0.25]]),
        "diversity_heldout": np.arange(4.0)[:, None],
    }
    systems = [row("one", cells), row("two", {name: values + 1 for name, values in cells.items()})]
    systems[0].metrics["frechet"] = Estimate(3.0)  # of the whole set: no cells
    return Results(prompts, systems, {"num_prompts": 4}, ["one"])


def test_a_level_s_numbers_are_those_of_its_prompts():
    """Catches a table of one level whose numbers are of all prompts."""
    assert levels_of(results()) == [1, 2, 4]
    open_ones = of_levels(results(), [1, 2])
    assert open_ones.prompts == PROMPTS[:3] and open_ones.settings["num_prompts"] == 3
    assert open_ones["one"].number("adherence").estimate == 0.5
    assert open_ones["one"].number("adherence").num_prompts == 3
    assert open_ones.difference("two", "one", "adherence").estimate == 1.0
    assert "frechet" not in open_ones.metrics, "a number of another set of prompts"
    frame = level_frame(results(), ["adherence"])
    assert frame["level"].tolist() == [1, 1, 2, 2, 4, 4]
    assert frame[frame["system"] == "one"]["estimate"].tolist() == [0.5, 0.5, 0.25]


def test_levels_are_a_file_and_tables(tmp_path):
    path = save_levels(results(), tmp_path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {r["level"] for r in rows} == {"1", "2", "4"} and "estimate" in rows[0]
    tables = level_tables(results(), ["adherence"])
    assert (
        "### Prompts with 1 named attribute: 2" in tables
        and "### Prompts with 4 named attributes: 1" in tables
    )


def test_prompts_of_one_level_or_of_another_world_are_not_split(tmp_path):
    other = results(["jazz", *PROMPTS[1:]])
    assert levels_of(other) == [] and save_levels(other, tmp_path) is None
    assert save_levels(of_levels(results(), [1]), tmp_path) is None
    with pytest.raises(ValueError, match="no prompt is of level 3; there are 1, 2, 4"):
        of_levels(results(), [3])


def test_adherence_is_judged_on_what_is_named_alone():
    """Catches an open prompt whose clip is wrong because of what the prompt leaves open."""
    names = {name: list(classes) for name, classes in ATTRIBUTES.items()}
    heard = {"instrument": "violin", "tempo": "slow", "register": "low", "key": "C major"}
    found = {name: np.full(4, classes.index(heard[name])) for name, classes in names.items()}
    prompts = [
        "violin solo",
        "violin solo, fast",
        "violin solo, slow low",
        "a slow low melody in D minor on a violin",
    ]
    table = scores_of(found, names, prompts)
    assert table["mean"].tolist() == [1.0, 0.5, 1.0, 0.75]
    assert np.isnan(table["key"][:3]).all() and table["key"][3] == 0
