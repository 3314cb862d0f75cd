"""Numbers, intervals, differences, hypervolume; and the file that holds them."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from diverse_cfg.evaluation.metrics import METRICS, Metric, Replicate, register, require
from diverse_cfg.evaluation.results import (
    Estimate,
    Results,
    SystemResult,
    estimate,
    estimate_of_cells,
    mean_estimate,
)
from diverse_cfg.evaluation.systems import System, single

ALL = {"reward", "heldout", "judge", "rules", "divergence", "validity", "codes", "timing", "reference"}
ALL |= {"facets"}
ALL |= {"text", "aesthetics_ce", "aesthetics_pq"}


def row(name, cells, seeds=None, **kwargs):
    """A row with the cells; `seeds` names the training seeds as folders do."""
    metrics = {metric: mean_estimate(values) for metric, values in cells.items()}
    names = range(next(iter(cells.values())).shape[1]) if seeds is None else [f"seed-{s}" for s in seeds]
    replicates = tuple(((f"runs/{name}/{label}", 1.0),) for label in names)
    return SystemResult(System(name, replicates, **kwargs), metrics=metrics, cells=cells)


def results(**rows):
    systems = [row(name, cells) for name, cells in rows.items()]
    prompts = [f"prompt {index}" for index in range(len(next(iter(systems[0].cells.values()))))]
    return Results(prompts, systems)


def noise(seed, shape, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1, size=shape)


# ---- intervals -----------------------------------------------------------------------------------


def test_interval_is_the_t_interval_of_the_means_by_prompt():
    """Catches clips that are resampled as if they were independent: the interval would be far too narrow."""
    cells = noise(0, (40, 1))
    found = mean_estimate(cells)
    low, high = scipy.stats.t.interval(0.95, 39, cells.mean(), scipy.stats.sem(cells[:, 0]))
    assert found.estimate == pytest.approx(cells.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.06), pytest.approx(high, abs=0.06))
    assert found.num_prompts == 40


def test_two_training_seeds_of_a_prompt_are_one_cluster():
    """Catches replicates counted as further prompts, which would narrow the interval by √2."""
    cells = noise(1, (30, 1))
    once, twice = mean_estimate(cells), mean_estimate(np.repeat(cells, 2, axis=1))
    assert twice.standard_error == pytest.approx(once.standard_error, rel=0.1)


def test_three_training_seeds_are_resampled_too():
    """Catches an interval that ignores how much training seeds differ."""
    by_seed = np.array([-1.0, 0.0, 1.0])
    cells = 0.01 * noise(2, (30, 3)) + by_seed
    found = mean_estimate(cells)
    assert found.high - found.low > 1
    assert mean_estimate(cells[:, 1:2]).high - mean_estimate(cells[:, 1:2]).low < 0.1


def test_prompts_without_a_value_do_not_count():
    cells = np.array([[1.0], [np.nan], [3.0]])
    found = mean_estimate(cells)
    assert (found.estimate, found.num_prompts) == (2.0, 2)
    assert mean_estimate(np.full((3, 1), np.nan)) == Estimate(None)


def test_one_prompt_has_a_number_and_no_interval():
    found = mean_estimate(np.array([[0.4]]))
    assert (found.estimate, found.low, found.high) == (0.4, None, None)
    assert found.text() == "0.400"


def test_times_are_clustered_by_batch():
    """Catches a time per clip, equal within a batch, that passes for as many measurements as clips."""
    batch = np.repeat([0, 1, 2, 3], 10)[:, None, None]
    seconds = np.repeat([1.0, 2.0, 3.0, 4.0], 10)[:, None, None]
    one = Replicate({"timing": {"seconds": seconds, "batch": batch}}, np.zeros((40, 1, 1, 1, 1)))
    found, _ = estimate(METRICS["seconds"], [one])
    assert found.estimate == 2.5
    assert found.high - found.low > 1.5  # four measurements, not forty


def test_differences_of_times_are_clustered_by_batch(tmp_path):
    """Catches the difference of two clustered columns as if clips of a batch were measured one by one."""
    batch = np.repeat([0, 1, 2, 3], 10)
    found = results(
        a={"seconds": np.repeat([1.0, 2.0, 3.0, 4.0], 10)[:, None]},
        b={"seconds": np.repeat([1.5, 1.0, 2.5, 2.0], 10)[:, None]},
    )
    unknown = found.difference("a", "b", "seconds")
    assert (unknown.estimate, unknown.low, unknown.high) == (0.75, None, None)
    for system in found.systems:
        system.clusters["seconds"] = batch
    found.save(tmp_path)
    for known in (found, Results.load(tmp_path)):
        difference = known.difference("a", "b", "seconds")
        assert difference.high - difference.low > 1.5  # four measurements, not forty
    found["b"].clusters["seconds"] = batch[::-1].copy() // 2
    assert found.difference("a", "b", "seconds").low is None


def test_set_metrics_are_jackknifed():
    """Catches an interval that does not contain its own number, and replicates that count as one."""
    values = np.random.default_rng(0).normal(size=(12, 1, 3, 4))
    codes, reference = np.zeros((12, 1, 3, 1, 1)), values[0, 0] * 2
    replicates = [
        Replicate({"heldout": {"values": shift + values}}, codes, reference=reference)
        for shift in (0.0, 1.0, 2.0)
    ]
    one, three = (estimate(METRICS["frechet"], replicates[:count])[0] for count in (1, 3))
    for found, count in ((one, 1), (three, 3)):
        assert found.low < found.estimate < found.high
        assert (found.num_prompts, found.num_replicates) == (12, count)
    assert three.high - three.low > 3 * (one.high - one.low)
    lonely = np.full_like(values, np.nan)
    lonely[0] = values[0]
    found, _ = estimate(
        METRICS["frechet"], [replace(replicates[0], features={"heldout": {"values": lonely}})]
    )
    assert found.estimate is not None and found.low is None


def test_a_measure_with_infinite_values_is_an_error():
    metric = Metric("x", "x", "", 1, (), cells=lambda replicate: np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match="'x' gave infinite"):
        estimate(metric, [Replicate({}, np.zeros((2, 1, 1, 1, 1)))])


# ---- comparisons ---------------------------------------------------------------------------------


def test_differences_are_paired():
    """Catches unpaired intervals: what a prompt does to both systems must cancel."""
    prompt_effect = 10 * noise(3, (20, 1))
    found = results(
        a={"adherence": prompt_effect + 0.5 + 0.1 * noise(4, (20, 1))}, b={"adherence": prompt_effect}
    )
    difference = found.difference("a", "b", "adherence")
    assert difference.estimate == pytest.approx(0.5, abs=0.1)
    assert difference.high - difference.low < 0.3
    assert difference.excludes_zero
    assert not found.difference("a", "a", "adherence").excludes_zero


def arms(**kinds):
    """Results of arms given as (training seeds, role), with cells that differ by training seed."""
    effect = {0: -1.0, 1: 0.0, 2: 2.0, None: 0.0}
    systems = []
    for index, (name, (seeds, role)) in enumerate(kinds.items()):
        columns = [noise(index, (20, 1)) + effect[seed] for seed in seeds]
        known = None if None in seeds else seeds
        systems.append(row(name, {"adherence": np.hstack(columns)}, known, role=role))
    return Results([f"prompt {index}" for index in range(20)], systems)


def test_three_seeds_against_one_base():
    """The base was not trained: it is the same for every seed, wherever it stands."""
    found = arms(arm=((0, 1, 2), "student"), base=((None,), "base"))
    arm, base = (found[name].cells["adherence"] for name in ("arm", "base"))
    for names, sign in ((("arm", "base"), 1), (("base", "arm"), -1)):
        difference = found.difference(*names, "adherence")
        assert difference.estimate == pytest.approx(sign * (arm.mean() - base.mean()))
        assert difference.num_replicates == 3
        assert difference.high - difference.low > 1  # the seeds differ


def test_one_trained_seed_is_compared_with_the_same_seed():
    """Catches a run that is held against the mean of three: what its seed does would count as a difference."""
    found = arms(one=((2,), "student"), three=((0, 1, 2), "student"))
    one, three = (found[name].cells["adherence"] for name in ("one", "three"))
    difference = found.difference("one", "three", "adherence")
    assert difference == mean_estimate(one - three[:, 2:])
    assert difference.num_replicates == 1


def test_training_seeds_are_paired_by_name_not_by_order():
    """Catches seeds 0, 1 and 2 held against 2, 0 and 1; of two and three only what both have counts."""
    found = arms(a=((0, 1, 2), "student"), b=((2, 0, 1), "student"), c=((1, 2), "student"))
    a, b, c = (found[name].cells["adherence"] for name in "abc")
    assert found.difference("a", "b", "adherence") == mean_estimate(a - b[:, [1, 2, 0]])
    assert found.difference("a", "c", "adherence") == mean_estimate(a[:, 1:] - c)


def test_seeds_that_cannot_be_paired_are_averaged():
    """Without shared or named seeds nothing can be paired; by order only where there are as many."""
    found = arms(
        a=((0, 1), "student"),
        other=((2,), "student"),
        three=((None, None, None), "student"),
        also=((None, None, None), "student"),
    )
    a, other, three, also = (found[name].cells["adherence"] for name in ("a", "other", "three", "also"))
    for names, cells in ((("a", "other"), (a, other)), (("three", "other"), (three, other))):
        mean = [values.mean(axis=1, keepdims=True) for values in cells]
        assert found.difference(*names, "adherence") == mean_estimate(mean[0] - mean[1])
    assert found.difference("three", "also", "adherence") == mean_estimate(three - also)


def test_the_recorded_experiment_is_compared_seed_by_seed():
    """An arm of one seed against one of three, in recorded files: they must stay readable."""
    found = Results.load(Path(__file__).parents[2] / "recipes/nano/results/experiment/test")
    cells = [found[name].cells["diversity_heldout"] for name in ("guarded", "β=80")]
    assert [values.shape[1] for values in cells] == [1, 3]
    assert found["β=80"].system.training_seeds == (0, 1, 2)
    assert found["base γ=3"].system.untrained
    difference = found.difference("guarded", "β=80", "diversity_heldout")
    assert difference == mean_estimate(cells[0] - cells[1][:, :1])
    assert found["β=80"].metrics["diversity_heldout"].num_replicates == 3


def test_comparisons_that_cannot_be_made():
    found = results(a={"adherence": noise(0, (5, 1))})
    found.systems.append(SystemResult(System("broken", single("x")), error="OSError: gone"))
    for arguments, message in (
        (("a", "nobody", "adherence"), "no system 'nobody'; there are a, broken"),
        (("a", "broken", "adherence"), "'broken' failed: OSError: gone"),
        (("a", "a", "frechet"), "has no 'frechet'"),
    ):
        with pytest.raises(ValueError, match=message):
            found.difference(*arguments)


def test_hypervolume_of_constant_systems_is_counted_by_hand():
    """Two points (1, 3) and (2, 1) above the corner (0, 0): 1·3 + 1·1 = 4."""
    ones = np.ones((6, 1))
    found = results(
        a={"diversity_heldout": ones, "adherence": 3 * ones},
        b={"diversity_heldout": 2 * ones, "adherence": ones},
    )
    volume = found.hypervolume(["a", "b"], "diversity_heldout", "adherence", (0, 0))
    assert (volume.estimate, volume.low, volume.high) == (4, 4, 4)


def test_hypervolume_of_a_metric_that_is_better_when_smaller():
    ones = np.ones((6, 1))
    found = results(a={"diversity_heldout": ones, "kl_teacher": 3 * ones})
    assert found.hypervolume(["a"], "diversity_heldout", "kl_teacher", (0, 10)).estimate == 7


def test_broken_systems_win_no_hypervolume():
    """Catches noise that wins the front because it is diverse."""
    ones = np.ones((6, 1))
    found = results(
        good={"diversity_heldout": ones, "adherence": ones},
        noise={"diversity_heldout": 9 * ones, "adherence": 9 * ones},
    )
    found["noise"].flags.append("only 0% of the clips are valid audio")
    assert found.hypervolume(["good", "noise"], "diversity_heldout", "adherence", (0, 0)).estimate == 1
    with pytest.raises(ValueError, match="flagged"):
        found.hypervolume(["noise"], "diversity_heldout", "adherence", (0, 0))


def seeded_front(spread, known=20):
    """Two arms of three seeds and the base; what a seed does, it does to both arms."""
    effect = spread * np.array([-1.0, 0.0, 1.0])
    found = Results([f"prompt {index}" for index in range(20)], [])
    for name, seeds, mean in (("a", (0, 1, 2), 3.0), ("b", (2, 1, 0), 2.0), ("base", None, 1.0)):
        size = 1 if seeds is None else 3
        cells = mean + (0 if seeds is None else effect[list(seeds)]) + 0.01 * noise(int(mean), (20, size))
        cells[known:] = np.nan
        role = "base" if seeds is None else "student"
        found.systems.append(
            row(name, {"diversity_heldout": cells, "adherence": 5 - cells}, seeds, role=role)
        )
    return found


def test_hypervolume_draws_training_seeds_too():
    """Catches an interval for these three runs alone, and seeds that are left out of one arm but not of the other."""
    axes = ("diversity_heldout", "adherence", (0, 0))
    alike, different = (seeded_front(spread).hypervolume(["a", "base"], *axes) for spread in (0, 0.5))
    assert different.high - different.low > 5 * (alike.high - alike.low)
    assert different.low <= different.estimate <= different.high
    assert different.num_replicates == 3
    # Both arms differ by the seeds in the same way, in another order: paired, it cancels but for the product.
    found = seeded_front(0.5)
    apart = found.hypervolume(["a"], "diversity_heldout", "diversity_heldout", (0, 0))
    paired = found.hypervolume_difference(["a"], ["b"], "diversity_heldout", "diversity_heldout", (0, 0))
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_one_seed_among_three_leaves_the_prompts():
    found = seeded_front(0.5)
    found.systems.append(row("one", {m: c[:, :1] for m, c in found["a"].cells.items()}, (0,)))
    area = found.hypervolume(["a", "one"], "diversity_heldout", "adherence", (0, 0))
    assert area.num_replicates == 1
    assert area.high - area.low < 0.5


def test_hypervolume_of_a_metric_that_few_prompts_have():
    """Catches prompts without a value that are drawn alone."""
    for known, has_interval in ((3, True), (1, False)):
        area = seeded_front(0.1, known).hypervolume(["a", "base"], "diversity_heldout", "adherence", (0, 0))
        assert (area.num_prompts, area.low is not None) == (known, has_interval)
    none = seeded_front(0.1, 0).hypervolume(["a"], "diversity_heldout", "adherence", (0, 0))
    assert none == Estimate(None)


def test_a_metric_without_direction_has_no_front():
    found = results(a={"level": np.ones((3, 1)), "adherence": np.ones((3, 1))})
    with pytest.raises(ValueError, match="'level' is neither"):
        found.hypervolume(["a"], "level", "adherence", (0, 0))


# ---- files and tables ----------------------------------------------------------------------------


def full_results():
    found = results(
        a={"adherence": noise(0, (5, 2)), "validity": np.ones((5, 2))}, b={"adherence": noise(1, (5, 1))}
    )
    found.systems.append(SystemResult(System("c | d", single("x")), error="OSError: gone"))
    found["a"].flags.append("look twice")
    found.settings, found.compare_to = {"seeds": [0]}, ["b"]
    return found


def test_results_survive_their_file(tmp_path):
    found = full_results()
    found.save(tmp_path)
    back = Results.load(tmp_path)
    assert back.to_dict() == found.to_dict()
    np.testing.assert_array_equal(back["a"].cells["adherence"], found["a"].cells["adherence"])
    assert back["c | d"].error == "OSError: gone"
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["systems"][0]["differences"]["b"]["adherence"]["estimate"] == pytest.approx(
        found.difference("a", "b", "adherence").estimate
    )


def test_files_of_two_evaluations_are_not_mixed(tmp_path):
    found = full_results()
    found.save(tmp_path / "one")
    results(a={"adherence": noise(0, (7, 1)), "level": noise(0, (7, 1))}).save(tmp_path / "two")
    (tmp_path / "two" / "cells.npz").replace(tmp_path / "one" / "cells.npz")
    with pytest.raises(ValueError, match="do not belong together"):
        Results.load(tmp_path / "one")


def test_results_of_another_format_are_refused(tmp_path):
    full_results().save(tmp_path)
    path = tmp_path / "metrics.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        Results.load(tmp_path)


def test_failures_and_flags_are_in_the_table():
    table = full_results().table(["adherence", "validity"])
    assert "failed: OSError: gone" in table
    assert "| a ⚠ |" in table and "⚠ a: look twice" in table
    assert "–" in table  # b has no validity


def test_the_csv_has_a_line_per_system_and_metric():
    lines = list(csv.DictReader(io.StringIO(full_results().csv())))
    frame = full_results().frame(["adherence"])
    assert len(lines) == 3 * 2 and frame["estimate"].isna().tolist() == [False, False, True]
    assert {line["system"] for line in lines} == {"a", "b", "c | d"}
    assert float(lines[0]["low"]) < float(lines[0]["estimate"]) < float(lines[0]["high"])


# ---- the registry --------------------------------------------------------------------------------


def test_unknown_metrics_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown metric 'adherance'; known: adherence"):
        require(["adherence", "adherance"], ALL, 8, 10)


@pytest.mark.parametrize(
    ("names", "available", "generations", "prompts", "message"),
    [
        (["frechet"], ALL - {"reference"}, 8, 10, "'frechet' needs reference"),
        (["adherence"], ALL - {"judge"}, 8, 10, "needs judge"),
        (["diversity_heldout"], ALL, 1, 10, "num_generations >= 2, got 1"),
        (["different_prompts_heldout"], ALL, 8, 1, "at least 2 prompts"),
        ([], ALL, 8, 10, "must be a list"),
        ("adherence", ALL, 8, 10, "must be a list"),
    ],
)
def test_metrics_that_cannot_be_computed_say_what_is_missing(names, available, generations, prompts, message):
    with pytest.raises(ValueError, match=message):
        require(names, available, generations, prompts)


def test_by_default_everything_that_can_be_computed():
    assert {metric.name for metric in require(None, ALL, 8, 10)} == set(METRICS)
    without = {metric.name for metric in require(None, {"codes", "timing"}, 1, 1)}
    assert without == {"codebook0_entropy", "decoder_rows", "seconds"}


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="'adherence' already"):
        register(METRICS["adherence"])
    with pytest.raises(ValueError, match="either cells or of_set"):
        register(Metric("new", "new", "", 1, ()))


def test_intervals_of_shares_stay_between_0_and_1():
    """Student's interval of few seeds is symmetric, and would promise more valid clips than there are."""
    cells = np.ones((40, 3))
    cells[:2, 1], cells[5, 0] = 0.5, 0.0
    plain = mean_estimate(cells)
    assert plain.high > 1
    share = estimate_of_cells(METRICS["validity"], cells)
    assert (share.estimate, share.low, share.high) == (plain.estimate, plain.low, 1.0)
    assert estimate_of_cells(METRICS["silence"], 1 - cells).low == 0
    assert estimate_of_cells(METRICS["level"], cells) == plain
