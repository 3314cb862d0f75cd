"""Figures: three files each, the CSV holds what is drawn, nothing broken wins, and series differ without
colour."""

import csv
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from diverse_cfg.evaluation import figures as figures_module
from diverse_cfg.evaluation.figures import (
    _series_hypervolumes,
    front,
    merge_curve,
    surface,
    trajectories,
)
from diverse_cfg.evaluation.report import _draw, first_metric
from diverse_cfg.evaluation.results import Estimate, Results, SystemResult, above_line, mean_estimate
from diverse_cfg.evaluation.systems import System, single
from diverse_cfg.plotting import Look, draw_curves, training_curves

PROMPTS = 12
XY = ("diversity_heldout", "adherence")


def row(name, diversity, adherence, *, spread=0.02, **kwargs):
    noise = np.random.default_rng(len(name)).normal(0, spread, size=(2, PROMPTS, 1))
    cells = {"diversity_heldout": diversity + noise[0], "adherence": adherence + noise[1]}
    metrics = {metric: mean_estimate(values) for metric, values in cells.items()}
    return SystemResult(System(name, single("x"), **kwargs), metrics=metrics, cells=cells)


def results(*rows):
    return Results([f"prompt {index}" for index in range(PROMPTS)], list(rows))


def lerp():
    points = ((0.0, 0.2, 0.9), (0.5, 0.35, 0.86), (1.0, 0.5, 0.7))
    return [
        row(f"merge {weight}", x, y, spread=0, series="LERP", role="merge", merge_weight=weight)
        for weight, x, y in points
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written."""
    drawn, write = [], figures_module.save
    monkeypatch.setattr(
        figures_module, "save", lambda figure, *rest: drawn.append(figure) or write(figure, *rest)
    )
    return drawn


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_front_writes_what_it_draws(tmp_path):
    found = results(
        row("base", 0.5, 0.6, role="base", series="base"),
        row("base γ=3", 0.3, 0.8, guidance_scale=3.0, role="guided", series="base"),
        *lerp(),
    )
    svg, png, table = front(found, *XY, tmp_path / "deep" / "front")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    lines = read_csv(table)
    assert [line[0] for line in lines[1:6]] == ["base", "base γ=3", "merge 0.0", "merge 0.5", "merge 1.0"]
    estimate = found["base"].metrics["diversity_heldout"]
    assert [float(number) for number in lines[1][2:5]] == [estimate.estimate, estimate.low, estimate.high]
    assert {line[0] for line in lines[8:]} == {"base", "LERP"}  # hypervolumes
    text = svg.read_text(encoding="utf-8")
    for label in ("γ 3", "λ .5", "prompt adherence", "hypervolume"):
        assert label in text, label


def test_the_surface_over_guidance_and_merge_weight(tmp_path, figures):
    """Every point of the grid in the CSV, contour lines between them; a failed system leaves a hole and no more."""
    grid = [(scale, weight) for scale in (1.0, 2.0, 4.0) for weight in (0.0, 0.5, 1.0)]
    rows = [
        row(
            f"{scale} {weight}", 0.5 - 0.05 * scale + 0.2 * weight, 0.5 + 0.08 * scale - 0.1 * weight, spread=0,
            series="grid", role="merge", student_guidance=scale, merge_weight=weight,
        )
        for scale, weight in grid
    ]  # fmt: skip
    drawn = _draw(results(*rows[:4], *rows[5:]), tmp_path)
    assert [picture.file for picture in drawn] == ["front.svg", "surface-grid.svg"]
    lines = read_csv(tmp_path / "surface-grid.csv")
    assert [(float(line[1]), float(line[2])) for line in lines[1:]] == [*grid[:4], *grid[5:]]
    assert float(lines[2][3]) == pytest.approx(0.5 - 0.05 + 0.1)
    panels = figures[-1].axes
    assert [axes.get_xlabel() for axes in panels] == ["γ that is told"] * 2
    assert all(len(axes.texts) > 1 for axes in panels), "lines tell their values"
    assert "λ .5, γ 4" in (tmp_path / "front.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no grid"):
        surface(results(*rows[:3]), "grid", XY, tmp_path / "x")


def test_figures_are_the_same_every_time(tmp_path):
    """Catches a date or random ids in the files: a rebuilt results page would differ from the recorded
    one."""
    found = results(*lerp())
    for name in ("one", "two"):
        front(found, *XY, tmp_path / name)
    for ending in ("svg", "png", "csv"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes(), ending


def test_a_broken_system_is_named_and_not_drawn(tmp_path):
    noise = row("white noise", 0.9, 0.1)
    noise.flags.append("only 0% of the clips are valid audio")
    found = results(row("base", 0.5, 0.6, series="base"), row("guided", 0.3, 0.8, series="base"), noise)
    svg, _, table = front(found, *XY, tmp_path / "front")
    assert "not drawn, invalid audio: white noise" in svg.read_text(encoding="utf-8")
    assert next(line for line in read_csv(table) if line[0] == "white noise")[-1] == noise.flags[0]
    volumes = _series_hypervolumes(found, *XY)
    assert volumes == _series_hypervolumes(results(*found.systems[:2]), *XY)


def test_hypervolume_above_the_worst_of_all_systems():
    """(0.3, 0.8) and (0.5, 0.6) above (0.2, 0.5): 0.1·0.3 + 0.2·0.1."""
    found = results(
        row("a", 0.3, 0.8, spread=0, series="s"),
        row("b", 0.5, 0.6, spread=0, series="s"),
        row("worst", 0.2, 0.5, spread=0, series="other"),
    )
    volumes = _series_hypervolumes(found, *XY)
    assert volumes.keys() == {"s"}
    assert volumes["s"].estimate == pytest.approx(0.05)


def test_the_legend_is_as_wide_as_the_page_and_has_the_corner(tmp_path, figures):
    """Catches a long entry that pushes the legend off the page, and a hypervolume above another corner than it says."""
    broken = [row(f"a system with a long name @{step}", 0.9, 0.1) for step in range(9)]
    for one in broken:
        one.flags.append("only 0% of the clips are valid audio")
    name = "a series whose name is longer by far than the column of a paper is wide"
    wide = [row(f"wide {k}", 0.1, 0.1, spread=0, series=name) for k in range(2)]
    found = results(*wide, *lerp(), *broken)
    svg, _, table = front(found, *XY, tmp_path / "front", corner=(0.3, 0.8))
    assert "hypervolume above (0.300, 0.800), with its interval" in svg.read_text()
    assert float(read_csv(table)[-1][1]) == pytest.approx(0.05 * 0.06)
    [legend] = figures[0].legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figures[0].bbox.x1


def test_merges_are_the_strongest_line(tmp_path, monkeypatch):
    """Catches a main series that is told from the others by its colour alone."""
    drawn = []
    monkeypatch.setattr(
        figures_module, "_point", lambda axes, row, x, y, look, alone: drawn.append((row, look, alone))
    )
    sweep = [row(f"base {k}", 0.2 + k / 10, 0.8 - k / 10, series="guidance") for k in range(3)]
    front(results(*sweep, *lerp(), row("one", 0.4, 0.7)), *XY, tmp_path / "front")
    looks = {r.system.series: look for r, look, _ in drawn}
    assert looks["LERP"].strong and not looks["guidance"].strong
    assert looks["LERP"].width > looks["guidance"].width
    assert [alone for r, _, alone in drawn if r.system.name in ("one", "base 0")] == [False, True]


def test_flagged_checkpoints_are_hollow_and_paths_begin_where_training_did(tmp_path, monkeypatch):
    """Catches invalid audio drawn like any other, and a path that leaves its start out."""
    faces = []
    plot = figures_module.Axes.plot
    monkeypatch.setattr(
        figures_module.Axes,
        "plot",
        lambda self, *a, **k: faces.append((k.get("label"), k.get("markerfacecolor"))) or plot(self, *a, **k),
    )
    steps = [row(f"run {step}", 0.5, 0.6 + step / 100, series="run", step=step) for step in (10, 20)]
    steps[1].flags.append("only 80% of the clips are valid audio")
    found = results(row("base", 0.3, 0.5), *steps)
    _, _, table = trajectories(found, *XY, tmp_path / "t", starts={"run": "base"})
    assert [face for label, face in faces if label is None].count("white") == 1
    assert any(label and "hollow" in label for label, _ in faces)
    lines = [line for line in read_csv(table) if line[0] == "run"]
    assert [line[1] for line in lines] == ["0", "10", "20"] and lines[-1][-1] == steps[1].flags[0]
    assert float(lines[0][2]) == found["base"].metrics[XY[0]].estimate
    with pytest.raises(ValueError, match="no system 'gone'"):
        trajectories(found, *XY, tmp_path / "t", starts={"run": "gone"})


def test_results_without_intervals_can_be_drawn(tmp_path):
    one = row("base", 0.5, 0.6)
    one.metrics = {name: Estimate(estimate.estimate, num_prompts=1) for name, estimate in one.metrics.items()}
    front(results(one), *XY, tmp_path / "front")
    assert (tmp_path / "front.png").is_file()


def test_the_lerp_against_the_straight_line(tmp_path):
    """Diversity on the line, adherence 0.06 above it: 0.86 − (0.9 + 0.7)/2."""
    found = results(*lerp())
    np.testing.assert_allclose(above_line(*found.systems, "adherence"), 0.06)
    np.testing.assert_allclose(above_line(*found.systems, "diversity_heldout"), 0, atol=1e-12)
    _, _, table = merge_curve(found, "LERP", ["diversity_heldout", "adherence"], tmp_path / "lerp")
    lines = read_csv(table)
    assert lines[0][5:] == ["above_line", "above_low", "above_high"]
    middle = next(line for line in lines if line[:2] == ["adherence", "0.5"])
    assert float(middle[5]) == pytest.approx(0.06)


def test_labels_of_a_crowd_hide_neither_each_other_nor_a_point(tmp_path, figures):
    """Three series of four systems close together: what has no room is left out, the rest can be read."""
    crowd = [
        row(
            f"{series} T={t}",
            0.3 + 0.02 * t + 0.01 * shift,
            0.8 - 0.02 * t,
            spread=0,
            series=series,
            temperature=t,
        )
        for shift, series in enumerate(("first", "second", "third"))
        for t in (0.9, 1.0, 1.1, 1.2)
    ]
    alone = row("alone", 0.6, 0.3, spread=0, series="alone")
    front(results(*crowd, alone), *XY, tmp_path / "front")
    [axes] = figures[0].axes
    figures[0].draw_without_rendering()  # positions as on the screen, not as in the file
    labels = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("T ")]
    assert 3 <= len(labels) < len(crowd), "some are left out"
    points = [
        axes.transData.transform((r.cells["diversity_heldout"].mean(), r.cells["adherence"].mean()))
        for r in crowd
    ]
    for index, label in enumerate(labels):
        assert not any(label.overlaps(other) for other in labels[:index])
        assert not any(label.contains(*point) for point in points)


def test_a_lerp_needs_its_ends(tmp_path):
    with pytest.raises(ValueError, match="no LERP can be made: it needs 0, 1"):
        merge_curve(results(*lerp()[:2]), "LERP", ["adherence"], tmp_path / "lerp")


def test_trajectories_follow_the_steps(tmp_path):
    """Catches points joined in the order of the table."""
    steps = [
        row(f"run {step}", 0.5 - step / 100, 0.6 + step / 100, series="run", step=step)
        for step in (20, 0, 10)
    ]
    _, _, table = trajectories(results(row("base", 0.5, 0.6), *steps), *XY, tmp_path / "t")
    assert [line[1] for line in read_csv(table) if line[0] == "run"] == ["0", "10", "20"]
    with pytest.raises(ValueError, match="no series has two systems with a step"):
        trajectories(results(row("base", 0.5, 0.6)), *XY, tmp_path / "t")


def test_training_curves_read_the_run_or_its_last_checkpoint(tmp_path):
    log = [{"step": step, "kl/clip": 10.0 / step} for step in range(1, 9)]
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    for step in (2, 10):
        folder = tmp_path / "running" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        folder.joinpath("trainer_state.json").write_text(json.dumps({"log_history": log[:step]}))
    runs = {"done": tmp_path / "done", "running": tmp_path / "running"}
    _, _, table = training_curves(runs, tmp_path / "curves", smooth=3)
    lines = read_csv(table)[1:]
    assert len(lines) == 16 and {line[1] for line in lines} == {"kl/clip"}
    with pytest.raises(FileNotFoundError, match=r"no trainer_state.json"):
        training_curves({"x": tmp_path}, tmp_path / "curves")
    (tmp_path / "done" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 1.0}]})
    )
    with pytest.raises(ValueError, match="none of the runs logged kl/clip"):
        training_curves({"done": tmp_path / "done"}, tmp_path / "curves")


def test_curves_of_several_seeds_are_a_mean_between_least_and_most(tmp_path):
    """Catches seeds that are paired by place instead of by step, and a seed that is left out."""
    logs = [[{"step": step, "kl/clip": float(step * factor)} for step in steps] for steps, factor in
            (([1, 2, 3, 4], 1), ([2, 3, 4], 3), ([2, 3, 4, 5], 8))]  # fmt: skip
    svg, _, table = draw_curves({"arm": logs}, tmp_path / "curves")
    rows = [[float(number) for number in line[2:]] for line in read_csv(table)[1:]]
    assert rows == [[step, 4.0 * step, step, 8.0 * step] for step in (2, 3, 4)]
    assert "training step" in svg.read_text()


def test_curves_are_smoothed_over_steps_not_over_points(tmp_path, monkeypatch):
    """Catches a metric measured every 50 steps that is averaged over as many points as one logged every 5."""
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **kwargs: drawn.append((x, y)))
    often = [{"step": step, "kl/clip": float(step)} for step in range(5, 31, 5)]
    seldom = [{"step": step, "reward/diversity": step / 100} for step in (0, 50, 100)]
    draw_curves({"arm": [often, seldom]}, tmp_path / "curves", smooth=15)
    (steps, logged), (at, measured) = drawn
    assert steps == pytest.approx([10, 15, 20, 25]) and logged == pytest.approx([10, 15, 20, 25])
    assert at == pytest.approx([0, 50, 100]) and measured == pytest.approx([0, 0.5, 1])


def test_only_what_was_measured_of_flagged_audio_is_hollow(tmp_path, monkeypatch):
    """Catches flags of one log that spread to another metric of the same steps."""
    hollow = []
    plot = figures_module.Axes.plot

    def spy(self, x, y, **kwargs):
        if kwargs.get("markerfacecolor") == "white" and len(x):
            hollow.append((list(x), list(y)))
        return plot(self, x, y, **kwargs)

    monkeypatch.setattr(figures_module.Axes, "plot", spy)
    logged = [{"step": step, "kl/clip": 1.0} for step in (1, 2, 3)]
    measured = [{"step": step, "reward/diversity": step / 10, "flagged": step == 2} for step in (1, 2, 3)]
    svg, *_ = draw_curves({"arm": [logged, measured]}, tmp_path / "curves")
    assert hollow == [([2.0], [0.2])] and "hollow" in svg.read_text()


def test_metrics_that_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="unknown metric 'colour'"):
        front(results(*lerp()), "colour", "adherence", tmp_path / "front")
    with pytest.raises(ValueError, match="no system has level and adherence"):
        front(results(*lerp()), "level", "adherence", tmp_path / "front")


def test_series_differ_without_colour():
    looks = [Look.number(index) for index in range(8)]
    assert len({look.marker for look in looks}) == len({str(look.linestyle) for look in looks}) == 8


def test_a_metric_without_a_number_is_no_axis(tmp_path):
    """Fault: prompts that ask for nothing that the judge hears end an evaluation without its page."""
    found = results(*lerp())
    assert first_metric(found, ("adherence", "rules")) == "adherence"
    for one in found.systems:
        one.metrics["adherence"] = Estimate(None)
    assert first_metric(found, ("adherence", "rules")) is None
    assert _draw(found, tmp_path) == []
