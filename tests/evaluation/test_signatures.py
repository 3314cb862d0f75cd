"""The five findings: shown when they are there, refuted when the opposite is, and open when the numbers do
not tell."""

from dataclasses import replace

import numpy as np
import pytest

from diverse_cfg.evaluation.results import Results, SystemResult, mean_estimate
from diverse_cfg.evaluation.signatures import (
    FAILS,
    HOLDS,
    MISSING,
    OPEN,
    Arms,
    signatures,
    to_markdown,
    useful_corner,
)
from diverse_cfg.evaluation.systems import System, single

PROMPTS = 24
ARMS = Arms(
    base="base",
    guided="guided",
    quality="q",
    diverse="d",
    merges="LERP",
    sweeps=("guidance", "temperature"),
    uniform="uniform",
)
# name: (adherence, diversity, KL, rows, series, λ): the paper's picture
PAPER = {
    "base": (0.60, 0.50, 40.0, 78, "guidance", None),
    "guided": (0.80, 0.30, 0.0, 156, "guidance", None),
    "q": (0.80, 0.30, 3.0, 78, "LERP", 0.0),
    "LERP .5": (0.79, 0.42, 6.0, 78, "LERP", 0.5),
    "d": (0.70, 0.54, 9.0, 78, "LERP", 1.0),
    "q T=1.2": (0.70, 0.35, 9.0, 78, "temperature", None),
    "uniform": (0.785, 0.43, 6.0, 78, "uniform", None),
}


def results(changes=(), spread=0.005):
    table = PAPER | dict(changes)
    rows = []
    for number, (name, (adherence, diversity, kl, cost, series, weight)) in enumerate(table.items()):
        noise = np.random.default_rng(number).normal(0, spread, size=(3, PROMPTS, 1))
        cells = {
            "adherence": adherence + noise[0],
            "diversity_heldout": diversity + noise[1],
            "kl_teacher": kl + noise[2],
            "decoder_rows": np.full((PROMPTS, 1), float(cost)),
        }
        system = System(name, single("x"), series=series, merge_weight=weight)
        rows.append(SystemResult(system, None, {m: mean_estimate(c) for m, c in cells.items()}, cells))
    return Results([f"prompt {number}" for number in range(PROMPTS)], rows)


def verdicts(found):
    return [signature.verdict for signature in found]


def test_the_papers_picture_is_recognised():
    found = signatures(results(), ARMS)
    assert verdicts(found) == [HOLDS] * 5, to_markdown(found)
    line = found[2].evidence[1].found
    assert line.estimate == pytest.approx(0.79 - 0.75, abs=0.005)  # half-way the line is at 0.75


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (1, {"q": (0.70, 0.30, 3.0, 78, "LERP", 0.0)}),  # it lost quality
        (1, {"q": (0.80, 0.60, 3.0, 78, "LERP", 0.0)}),  # it is more diverse than the base
        (1, {"q": (0.80, 0.30, 50.0, 78, "LERP", 0.0)}),  # it moved away from the teacher
        (1, {"q": (0.80, 0.30, 3.0, 160, "LERP", 0.0)}),  # it costs more
        (2, {"d": (0.70, 0.45, 9.0, 78, "LERP", 1.0)}),  # above the guided base, below the base
        (2, {"d": (0.50, 0.54, 9.0, 78, "LERP", 1.0)}),  # quality below the base's
        (3, {"LERP .5": (0.70, 0.42, 6.0, 78, "LERP", 0.5)}),  # below the line
        (3, {"LERP .5": (0.79, 0.30, 6.0, 78, "LERP", 0.5)}),  # diversity far off the line
        (4, {"q T=1.2": (0.85, 0.60, 9.0, 78, "temperature", None)}),  # temperature is better than any merge
        (5, {"uniform": (0.60, 0.43, 6.0, 78, "uniform", None)}),  # far below the front
    ],
)
def test_the_opposite_is_refuted(number, changes):
    """Catches a test that cannot fail, and signs that are swapped."""
    found = signatures(results(changes), ARMS)
    assert found[number - 1].verdict == FAILS, to_markdown(found)


def test_noise_shows_nothing():
    """Catches "no significant difference" taken for equality: wide intervals leave everything open."""
    found = signatures(results(spread=2.0), ARMS)
    assert (
        found[0].evidence[1].verdict == OPEN
    )  # "has the quality of guidance" is not shown by a wide interval
    assert found[2].verdict == OPEN


def test_what_was_not_measured_is_said_so():
    found = results()
    found.systems = [row for row in found.systems if row.system.name != "uniform"]
    found["d"].error = "OSError: gone"
    answers = signatures(found, ARMS)
    assert [answers[index].verdict for index in (1, 2, 4)] == [MISSING] * 3
    assert answers[0].verdict == HOLDS
    no_arms = Arms("base", "guided", "q", "d", "LERP")
    assert [signatures(results(), no_arms)[index].verdict for index in (3, 4)] == [MISSING] * 2


def test_the_ends_of_a_lerp_may_be_the_students_themselves():
    """Catches a finding that is lost because the ends of a LERP were evaluated under another series."""
    found, other = results(), results()
    for name in ("q", "d"):
        other[name].system = replace(other[name].system, series="students", merge_weight=None)
    assert signatures(other, ARMS) == signatures(found, ARMS)
    other["q"].flags.append("broken")
    assert signatures(other, ARMS)[2].verdict == MISSING


def test_the_corner_does_not_depend_on_what_else_was_evaluated():
    """Catches the worst of all systems as the corner: another system would change the verdict."""
    before = signatures(results(), ARMS)[3]
    after = signatures(results({"bad": (0.01, 0.01, 90.0, 78, "other", None)}), ARMS)[3]
    assert before == after
    assert useful_corner(results(spread=0), ARMS, "diversity_heldout", "adherence") == (0.3, 0.6)


def test_sweeps_are_pooled_with_the_members_of_other_series():
    """Two sweeps that lose to the merges one by one may win together, so both are claimed."""
    sweeps = (("guidance", "q"), "temperature")
    found = signatures(results(), replace(ARMS, sweeps=sweeps))[3]
    assert [claim.claim.removeprefix("larger hypervolume than ") for claim in found.evidence] == [
        "'guidance' with 'q'", "'temperature'", "all of these together"
    ]  # fmt: skip
    changes = {  # above (.3, .6): .019 and .0145, together .026; the merges .0232
        "one": (0.79, 0.40, 9.0, 78, "guidance", None),
        "two": (0.65, 0.54, 9.0, 78, "temperature", None),
        "LERP .5": (0.75, 0.44, 6.0, 78, "LERP", 0.5),
        "d": (0.62, 0.55, 9.0, 78, "LERP", 1.0),
    }
    apart = signatures(results(changes, spread=0.0005), ARMS)[3]
    assert [claim.verdict for claim in apart.evidence] == [HOLDS, HOLDS, FAILS], to_markdown([apart])
    gone = signatures(results(), replace(ARMS, sweeps=(*sweeps, "never played")))[3]
    assert [claim.verdict for claim in gone.evidence] == [HOLDS, HOLDS, MISSING, MISSING]


def test_a_flagged_system_proves_nothing():
    """Catches noise on the LERP that makes a front: its hypervolume must not count."""
    found = results({"LERP .5": (0.95, 0.95, 6.0, 78, "LERP", 0.5)})
    found["LERP .5"].flags.append("only 0% of the clips are valid audio")
    answers = signatures(found, ARMS)
    assert answers[2].verdict == MISSING
    assert answers[3].verdict != MISSING
    ends_only = results()
    ends_only.systems = [row for row in ends_only.systems if row.system.name != "LERP .5"]
    assert answers[3].evidence[0].found == signatures(ends_only, ARMS)[3].evidence[0].found


def test_the_report_shows_verdicts_and_numbers():
    text = to_markdown(signatures(results(), ARMS))
    assert text.count("### ") == 5 and text.count("**holds**") == 5
    assert "| it costs fewer decoder rows than the guided base | -78.0 | holds |" in text
