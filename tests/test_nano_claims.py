"""Claims that are registered before test prompts are played: their numbers, Holm's adjustment, their registration."""

import numpy as np
import pytest

from diverse_cfg.evaluation.results import Estimate, Results, SystemResult, mean_estimate
from diverse_cfg.evaluation.systems import System, single

pytestmark = pytest.mark.usefixtures("nano_recipe")

PROMPTS = [
    "violin solo",
    "piano melody",
    "a slow tune on a flute",
    "a fast low melody in D minor on an organ",
]


def row(name, adherence, diversity, series, **kwargs):
    cells = {"adherence": np.array(adherence)[:, None], "diversity_heldout": np.array(diversity)[:, None]}
    metrics = {metric: mean_estimate(values) for metric, values in cells.items()}
    return SystemResult(System(name, single("x"), series=series, **kwargs), metrics=metrics, cells=cells)


def results():
    rows = [
        row("base γ=1", [0.5, 0.6, 0.5, 0.1], [0.6, 0.6, 0.6, 0.2], "guidance"),
        row("base γ=3", [0.9, 1.0, 0.9, 0.1], [0.2, 0.2, 0.2, 0.2], "guidance"),
        row("β=0", [0.9, 1.0, 0.9, 0.1], [0.2, 0.2, 0.2, 0.2], "students"),
        row("β=40", [0.8, 0.9, 0.81, 0.9], [0.4, 0.4, 0.4, 0.4], "students"),
        row("β=80", [0.6, 0.7, 0.6, 0.9], [0.7, 0.7, 0.7, 0.4], "students"),
        row("half", [0.8, 0.9, 0.8, 0.9], [0.4, 0.4, 0.4, 0.4], "merges", merge_weight=0.5, role="merge"),
    ]
    return Results(PROMPTS, rows, {"num_prompts": 4})


def claim(**values):
    from claims import Claim

    return Claim.from_dict({"claim": "it is so", "system": "β=40", "above": 0.03} | values, "e.yaml")


def test_a_claim_is_measured_on_its_levels_and_against_what_it_names():
    """Catches a line that is read at another diversity, and prompts of other levels in the number."""
    measure = lambda **values: claim(**values).measure(results()).estimate  # noqa: E731
    on_line = measure(line="guidance", levels=[1, 2])
    # Half way between the two is 0.7, 0.8, 0.7: above it by 0.1, 0.1 and 0.11.
    assert on_line == pytest.approx(0.31 / 3)
    assert measure(system="β=80", line="guidance", levels=[1, 2]) == pytest.approx(0.1), "the nearest: γ = 1"
    assert measure(other="base γ=1", levels=[1]) == pytest.approx(0.3)
    assert measure(system="half", parents=["β=0", "β=80"], levels=[1, 2]) == pytest.approx((0.05 * 3) / 3)
    # The mean of 0.5, 0.6, 0.5 and 0.9, 1.0, 0.9 is 0.7, 0.8, 0.7 again.
    assert measure(parents=["base γ=1", "base γ=3"], levels=[1, 2]) == pytest.approx(0.31 / 3)
    assert measure(levels=[4]) == pytest.approx(0.9)
    rows = [row(name, [0.5], [x], "guidance") for name, x in (("a", 0.3), ("b", 0.4))]
    less_diverse = Results(PROMPTS[3:], [*rows, row("β=40", [0.5], [0.2], "students")])
    with pytest.raises(ValueError, match="less diverse than all"):
        claim(line="guidance").measure(less_diverse)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    """Worked by hand: 0.01·4, 0.02·3, max(0.06, 0.03·2), max(0.06, 0.5·1)."""
    from claims import holm

    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_a_p_value_is_that_of_the_interval():
    """A bound at the end of a 95 % interval has a one-sided p of 2.5 %; two bounds take the worse."""
    found = Estimate(0.1, 0.05, 0.15)
    assert claim(above=0.05).probability(found) == pytest.approx(0.025, abs=1e-4)
    assert claim(above=0.1).probability(found) == pytest.approx(0.5)
    assert claim(above=-1.0, below=0.15).probability(found) == pytest.approx(0.025, abs=1e-4)
    assert claim(above=0.2).refuted(found) and not claim(above=0.12).refuted(found)
    assert claim(above=0.0).probability(Estimate(0.1)) == 1.0, "no interval shows nothing"


def test_one_of_many_claims_needs_more_than_one_alone():
    """Catches a table that tests each claim as if it were the only one."""
    from claims import tested

    alone = claim(line="guidance", levels=[1, 2], above=0.0)
    absent = claim(system="β=90")
    [first] = tested(results(), [alone])
    rows = tested(results(), [alone, *[absent] * 4])
    assert first["verdict"] == "holds" and rows[1]["verdict"] == "not measured"
    assert rows[0]["p"] == pytest.approx(5 * first["p"])


def test_claims_stay_as_they_were_when_the_first_test_prompt_was_played(tmp_path):
    """Catches a bound that is moved after the numbers are known."""
    from claims import claims_table, register, registered_in

    first = claim(above=0.03)
    register([first], tmp_path / "test")
    register([claim(above=0.0)], tmp_path / "test")
    assert registered_in(tmp_path / "test") == [first]
    table = claims_table(results(), [claim(above=0.0)], registered_in(tmp_path / "test"))
    assert "(not as registered)" in table
    assert "(not as registered)" not in claims_table(results(), [first], registered_in(tmp_path / "test"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bound": 3}, "a claim has claim, system and some of metric, levels"),
        ({"above": None}, "needs above or below"),
        ({"line": "guidance", "other": "base"}, "one of other, line and parents at most"),
        ({"metric": "beauty"}, "names 'beauty', which is no metric"),
        ({"levels": 3}, "claims: levels=3 must be a list"),
    ],
)
def test_wrong_claims_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        claim(**values)


def test_a_claim_about_what_is_not_played_is_refused_before_the_first_training(tmp_path):
    from experiment import check_plan

    from tests.test_nano_experiment import load

    experiment = load(tmp_path, "open.yaml")
    experiment.claims = [*experiment.claims, claim(line="guidance on the students")]
    with pytest.raises(
        ValueError, match="is about 'guidance on the students', which the sweep test does not play"
    ):
        check_plan(experiment)


def test_the_shipped_claims_were_there_before_their_numbers():
    """Catches claims that were written, or moved, after the recorded test sweep was played."""
    from claims import registered_in
    from experiment import HERE, Experiment

    recorded = HERE / "results" / "open" / "test"
    registered = registered_in(recorded)
    assert registered is None or registered == Experiment.load(HERE / "open.yaml").claims
