"""The experiment of the nano base: its file, the order of its tasks, and the page that is built from its numbers."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from diverse_cfg.atomic import write_text
from diverse_cfg.evaluation.protocol import SweepConfig
from diverse_cfg.evaluation.results import Results, SystemResult, mean_estimate
from diverse_cfg.evaluation.systems import System, expand_systems, single

RECIPE = Path(__file__).parents[1] / "recipes" / "nano"


pytestmark = pytest.mark.usefixtures("nano_recipe")


def load(tmp_path, file="experiment.yaml", **changes):
    from experiment import Experiment

    loaded = Experiment.load(RECIPE / file)
    loaded.output = str(tmp_path / "runs")
    for name, value in changes.items():
        setattr(loaded, name, value)
    return loaded


def finish(experiment, arm, seed, steps=300, snapshots=()):
    folder = experiment.folder(arm, seed)
    for step in snapshots:
        (folder / "snapshots" / str(step)).mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    done = {"arm": arm, "seed": seed, "steps": steps, "alarms": ["KL budget"], "commit": "abc"}
    done |= {"settings": experiment.training_hash(arm, seed)}
    log = [
        {"step": step, "kl/clip": 10.0 / step, "reward/diversity": 0.3, "step_time": 2.0}
        for step in (5, 10, 13)
    ]
    log.append({"step": 13, "train_runtime": 4.0})  # of the last process alone
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    write_text(folder / "done.json", json.dumps(done))  # last and whole, as other threads look for it


def test_the_experiment_is_well_formed(tmp_path):
    """Catches an arm that starts nowhere, a recipe's key that the trainer does not know, a name used twice."""
    from diverse_cfg.cli.train import TrainArguments
    from diverse_cfg.config import CFGDiversityConfig

    experiment = load(tmp_path)
    for arm, seed in experiment.runs():
        finish(experiment, arm, seed, snapshots=experiment.snapshots[:2])
        settings = experiment.settings_of(arm, seed)
        known = {*TrainArguments.__dataclass_fields__, *CFGDiversityConfig.__dataclass_fields__}
        assert set(settings) <= known
        assert settings["seed"] == seed and Path(settings["diversity_embedder"]).is_dir()
        assert ("eval-encoder" in settings["monitor_embedder"]) is True
    for name in experiment.sweeps:
        settings = experiment.sweep(name)
        assert SweepConfig.from_dict(settings).output.endswith(name)
        assert len(expand_systems(settings["systems"])) >= 6
    [uniform] = [s for s in expand_systems(experiment.sweep("test")["systems"]) if s.name == "uniform"]
    assert len(uniform.replicates) == 3 and [weight for _, weight in uniform.replicates[0]] == [0.25] * 4
    assert [str(experiment.folder("beta-80", seed)) for seed in (0, 1, 2)] == [
        m[3][0] for m in uniform.replicates
    ]


def test_every_sweep_is_built_before_the_first_training(tmp_path, monkeypatch, capsys):
    """Fault: hours of training, and then a sweep that is refused: by its arms' names, or by those of `far_end`."""
    import experiment as module

    module.check_plan(load(tmp_path))
    monkeypatch.setattr(module, "run_all", lambda *_: pytest.fail("trained already"))
    text = (RECIPE / "experiment.yaml").read_text(encoding="utf-8")
    for wrong, said in (
        ("diverse: β=80,", "arms: diverse names 'β=90', which is no system here"),
        ("[β=0, guidance on the quality student]", "arms: sweeps names 'β=90', which is no system or series"),
        ("diversity_coef: 120.0", "diversity_coef='β=90' must be a finite number"),
    ):
        changed = wrong.replace("β=80", "β=90").replace("β=0", "β=90").replace("120.0", "β=90")
        (tmp_path / "e.yaml").write_text(text.replace(wrong, changed), encoding="utf-8")
        assert module.main(["--config", str(tmp_path / "e.yaml"), "--output", str(tmp_path / "runs")]) == 1
        assert said in capsys.readouterr().err


def test_the_open_experiment_is_guarded_and_chooses_without_test_prompts(tmp_path):
    """Catches a diversity student that is paid for clips that die, and a β that test prompts helped to choose."""
    from experiment import check_plan

    experiment = load(tmp_path, "open.yaml")
    check_plan(experiment)
    for arm in experiment.arms:
        settings = experiment.settings_of(arm, 1)
        guarded = settings["diversity_coef"] > 0 and arm != "unguarded"
        assert settings.get("guards") == ({"max_silence": 0.1} if guarded else None), arm
        assert settings["dataset_name"] == "nano-open" and settings["save_steps"] < settings["max_steps"]
    validation = experiment.sweeps["validation"]
    assert validation["prompts_split"] == "validation"
    assert {sweep["prompts"] for sweep in experiment.sweeps.values()} == {"nano-open"}


def test_the_recorded_experiment_has_no_guard_but_where_it_says_so(tmp_path):
    """Catches a recipe's new guard that changes what was recorded: it was measured without."""
    experiment = load(tmp_path)
    guarded = {arm for arm in experiment.arms if experiment.settings_of(arm, 0).get("guards")}
    assert guarded == {"guarded", "overdone-guarded"}


def test_all_students_continue_from_the_quality_student_of_their_seed(tmp_path):
    """Catches arms of different length or start, which would be compared as if only β differed."""
    experiment = load(tmp_path)
    arms = [experiment.settings_of(f"beta-{beta}", 1) for beta in (0, 20, 40, 80)]
    assert {arm["diversity_coef"] for arm in arms} == {0.0, 20.0, 40.0, 80.0}
    for key in (
        "model_name_or_path",
        "max_steps",
        "learning_rate",
        "warmup_steps",
        "num_generations",
        "ema_decay",
    ):
        assert len({arm[key] for arm in arms}) == 1, key
    assert arms[0]["model_name_or_path"] == str(experiment.folder("quality", 1))


def test_snapshots_become_a_trajectory(tmp_path):
    experiment = load(
        tmp_path, sweeps={"t": {"systems": [{"name": "β=40", "model": "beta-40", "snapshots": True}]}}
    )
    finish(experiment, "beta-40", 0, steps=300, snapshots=(25, 50))
    systems = experiment.sweep("t")["systems"]
    assert [(s["name"], s["step"], s["series"]) for s in systems] == [
        ("β=40 @25", 25, "β=40"), ("β=40 @50", 50, "β=40"), ("β=40 @300", 300, "β=40"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\nseeds: [0]\narms: {}\nsweeps: {}\nsteps: 3", "unknown steps; known: output"),
        (
            "output: x\nseeds: [0]\narms: {a: {recipe: r, start: b}}\nsweeps: {}",
            "start='b' is neither nano nor an arm",
        ),
        (
            "output: x\nseeds: [0]\narms: {a: {recipe: r, start: nano, beta: 3}}\nsweeps: {}",
            "arm a: unknown beta",
        ),
        ("output: x\nseeds: [0]\narms: {}\nsweeps: {}\nseeds: [1]", "seeds is set twice: keep one"),
        (
            "output: x\nseeds: [0]\narms: {a: {recipe: r, start: nano}, b: {recipe: r, start: a, seeds: [1]}}\n"
            "sweeps: {}",
            "arm b: its start a is not trained with seed 1",
        ),
        ("output: x\nseeds: [0.5]\narms: {}\nsweeps: {}", r"seeds=\[0.5\] must be a list"),
        ("output: x\narms: {}\nsweeps: {}", "seeds is missing"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    from experiment import Experiment

    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Experiment.load(tmp_path / "e.yaml")


def test_tasks_wait_for_what_they_start_from_and_failures_stop_only_their_heirs(tmp_path, monkeypatch):
    """Catches a student trained before its start exists, a lost failure, and work that is done twice."""
    import experiment as module

    folder = tmp_path / "recorded"
    monkeypatch.setattr(
        module.Experiment, "_merged", lambda self, arm: {"recipe": arm.recipe} | self.settings | arm.settings
    )
    arms = {"q": module.Arm("r", "nano"), "d": module.Arm("r", "q"), "e": module.Arm("r", "nano", seeds=[0])}
    sweeps = {
        "s": {"systems": [{"name": "d", "model": "d"}]},
        "t": {"systems": [{"name": "e", "model": "e"}]},
    }
    experiment = load(tmp_path, arms=arms, sweeps=sweeps, seeds=[0, 1], halfway={})
    started = []

    def fake(command, **_):
        task = command[command.index("--task") + 1]
        started.append(task)
        if task == "q/1" and started.count(task) == 1:
            return subprocess.CompletedProcess(command, 1)
        if task.startswith("part:"):
            pass
        elif task.startswith("sweep:"):
            measure(experiment, task[6:])
        else:
            arm, _, seed = task.partition("/")
            finish(experiment, arm, int(seed))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(
        module.subprocess,
        "run",
        lambda command, **_: (
            fake(command) if "--task" in command else subprocess.CompletedProcess(command, 0, stdout="abc")
        ),
    )
    shares = {name: [f"part:{name}:{part}/4" for part in range(4)] for name in sweeps}
    run = lambda only=None: module.run_all(experiment, tmp_path / "e.yaml", 2, only, folder)  # noqa: E731
    assert run() == ["q/1", "d/1", *shares["s"], "sweep:s"]
    at = started.index
    assert at("q/0") < at("d/0")
    assert all(at("e/0") < at(share) < at("sweep:t") for share in shares["t"])
    assert sorted(started) == sorted(["d/0", "e/0", "q/0", "q/1", *shares["t"], "sweep:t"])
    started.clear()
    started.append("q/1")  # this time it works
    assert not folder.exists(), "a part of an experiment is no evidence"
    assert run() == []
    assert started[1:3] == ["q/1", "d/1"] and started[-1] == "sweep:s" and len(started) == 8
    assert run() == [] and len(started) == 8
    assert (folder / "s" / "metrics.json").read_text() == "s" and (folder / "t" / "run.json").is_file()
    runs = json.loads((folder / "runs.json").read_text())
    assert [(run["arm"], run["seed"]) for run in runs] == [("q", 0), ("d", 0), ("q", 1), ("d", 1), ("e", 0)]
    assert {run["seconds"] for run in runs} == {26}, "13 steps of 2 s, however many processes took them"


def measure(experiment, name):
    import experiment as module

    folder = experiment.sweeps_folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(name)
    module.finish_sweep(folder, experiment.sweep_hash(name))


def changed(experiment, place, value):
    *path, last = place.split("/")
    at = experiment
    for key in path:
        at = at[key] if isinstance(at, dict) else getattr(at, key)
    if isinstance(at, dict):
        at[last] = value
    else:
        setattr(at, last, value)


@pytest.fixture
def whole(tmp_path):
    """An experiment of which everything is done."""
    experiment = load(tmp_path)
    for arm, seed in experiment.runs():
        finish(experiment, arm, seed)
    for name in experiment.sweeps:
        measure(experiment, name)
    experiment.halfway = {}
    return experiment


def test_nothing_is_done_twice(whole):
    from experiment import missing

    assert missing(whole, None, 2) == {}
    whole.output = str(whole.output)  # folders are not among the settings
    whole.sweeps["test"] |= {"num_prompts": 64}
    assert missing(whole, None, 2) == {}


@pytest.mark.parametrize(
    ("place", "value", "sweeps"),
    [
        ("sweeps/test/num_prompts", 96, ["test"]),
        ("sweeps/hacking/systems", [{"name": "base", "model": "nano"}], ["hacking"]),
        ("snapshots", [25], ["validation", "test", "trajectories", "hacking"]),
    ],
)
def test_a_changed_sweep_is_measured_again(whole, place, value, sweeps):
    """Catches results of another protocol that pass for those of the file."""
    from experiment import missing

    changed(whole, place, value)
    assert list(missing(whole, None, 0)) == [f"sweep:{name}" for name in sweeps]


@pytest.mark.parametrize(
    ("place", "value", "arm"),
    [
        ("arms/beta-80/settings/diversity_coef", 999.0, "beta-80"),
        ("settings/max_steps", 5, "quality"),
        ("arms/quality/settings", {"learning_rate": 1.0}, "quality"),
        ("arms/beta-20/start", "nano", "beta-20"),
        ("arms/overdone/judged", False, "overdone"),
    ],
)
def test_a_training_with_other_settings_is_neither_done_nor_replaced(whole, place, value, arm):
    """Catches a student of another β that passes for the file's, and hours of training that are overwritten."""
    from experiment import claim, missing

    changed(whole, place, value)
    with pytest.raises(ValueError, match=f"{arm}/seed-0 was trained with other settings"):
        missing(whole, None, 0)
    with pytest.raises(ValueError, match="take another --output"):
        claim(whole, arm, 0)


def test_an_heir_of_a_changed_start_is_not_done(whole):
    """Catches a student whose own settings are the same, of a start that was trained anew."""
    changed(whole, "arms/quality/settings", {"learning_rate": 1.0})
    for seed in (0, 1, 2):
        finish(whole, "quality", seed)
    from experiment import missing

    with pytest.raises(ValueError, match="beta-0/seed-0 was trained with other settings"):
        missing(whole, None, 0)


def test_a_training_does_not_go_on_with_other_settings(tmp_path):
    from experiment import claim, missing

    experiment = load(tmp_path)
    claim(experiment, "quality", 0)
    claim(experiment, "quality", 0)
    experiment.settings["learning_rate"] = 1.0
    with pytest.raises(ValueError, match="quality/seed-0 was trained with other settings"):
        missing(experiment, None, 0)


def test_what_was_done_before_settings_were_noted_counts_as_done(whole, capsys):
    from experiment import missing

    (whole.folder("beta-80", 0) / "done.json").write_text('{"steps": 300}')
    whole.arms["beta-80"].settings["diversity_coef"] = 999.0
    for seed in (1, 2):
        finish(whole, "beta-80", seed)
    tasks = missing(whole, ["beta-80"], 0)
    assert (
        tasks == {} and "beta-80/seed-0: done, with settings that were not noted" in capsys.readouterr().out
    )


def test_some_seeds_alone(tmp_path):
    """Catches an arm of one seed that is left with a start that nobody trains."""
    experiment = load(tmp_path, "open.yaml")
    experiment.take_seeds([2, 3])
    experiment.check_seeds("here")
    assert experiment.seeds_of("music-25") == [2, 3] and experiment.seeds_of("unguarded") == [2]
    assert load(tmp_path, "open.yaml").seeds_of("unguarded") == [1]


def test_only_the_shipped_experiment_is_recorded_in_the_repository(tmp_path):
    """Catches a trial with another file or folder that replaces the evidence of the page."""
    from experiment import CONFIG, RECORDED, recorded_folder

    experiment = load(tmp_path)
    own = Path(experiment.output) / "recorded"
    assert recorded_folder(CONFIG, None, None, experiment) == RECORDED
    assert recorded_folder(CONFIG, "elsewhere", None, experiment) == own
    assert recorded_folder(tmp_path / "mine.yaml", None, None, experiment) == own
    assert recorded_folder(tmp_path / "mine.yaml", None, tmp_path, experiment) == tmp_path
    one_seed = load(tmp_path)
    one_seed.take_seeds([1])
    assert recorded_folder(CONFIG, None, None, one_seed) == own, "a part is no evidence"
    shipped = RECIPE / "open.yaml"
    assert recorded_folder(shipped, None, None, load(tmp_path, "open.yaml")) == RECORDED.with_name("open")


def test_half_way_comes_after_the_test_sweep(tmp_path):
    from experiment import missing

    experiment = load(tmp_path)
    tasks = missing(experiment, None, 0)
    assert list(tasks)[-1] == "halfway" and tasks["halfway"] == ["sweep:test"]
    assert missing(experiment, ["halfway"], 0) == {"halfway": ["sweep:test"]}


# ---- the page ----------------------------------------------------------------------------------------------------


def recorded(tmp_path):
    """A test sweep with numbers that are known, and logs of three seeds."""

    def row(name, x, y, seeds=1, **kwargs):
        under_reward = 0.2 if name == "base γ=1" else x  # where β=80 is above the base, other than held out
        values = {"diversity_heldout": x, "diversity_reward": under_reward, "adherence": y}
        cells = {metric: np.full((6, seeds), value) for metric, value in values.items()}
        cells = {k: v + 0.001 * np.arange(6)[:, None] for k, v in cells.items()}
        system = System(name, single("x") * seeds, **kwargs)
        return SystemResult(system, metrics={k: mean_estimate(v) for k, v in cells.items()}, cells=cells)

    rows = [
        row("base γ=1", 0.5, 0.6, role="base", series="guidance on the base"),
        row("base γ=3", 0.1, 0.8, role="guided", series="guidance on the base", guidance_scale=3.0),
        row("β=0", 0.1, 0.8, 3, series="students"), row("β=80", 0.3, 0.75, 3, series="students"),
        *(row(f"LERP λ={w:g}", 0.1 + 0.2 * w, 0.8 - 0.05 * w**2, 3, series="merges", role="merge", merge_weight=w)
          for w in (0.0, 0.5, 1.0)),
        row("paper's estimator", 0.2, 0.7, series="baselines"),
    ]  # fmt: skip
    settings = {"num_generations": 8, "seeds": [0, 1], "machine": "a machine"}
    Results([f"p{i}" for i in range(6)], rows, settings).save(tmp_path / "test")
    judged = "eval_kl/clip,eval_reward/diversity,eval_reward/monitor_diversity,eval_rewards/adherence/mean"
    lines = [f"arm,seed,step,kl/clip,reward/diversity,step_time,{judged}"]
    lines += [
        f"beta-80,{seed},{step},{seed + 1.0},0.{step},1.5,,,," for seed in range(3) for step in range(1, 9)
    ]
    lines += [f"overdone,0,{step},,,,{step}.5,0.4,0.2,0.8" for step in (0, 25, 50)]
    lines += [f"forward-kl,0,{step},7,0.5,1.5,,,," for step in (1, 2)]
    (tmp_path / "test" / "run.json").write_text('{"commit": "abc"}')
    (tmp_path / "logs.csv").write_text("\n".join(lines) + "\n")
    runs = [
        {"arm": "beta-80", "seed": seed, "seconds": 3600, "commit": "abc", "alarms": []} for seed in range(3)
    ]
    alarms = [[25, "KL budget: far"], [50, "quality: low"], [50, "KL budget: farther"]]
    runs.append({"arm": "overdone", "seed": 0, "seconds": 0, "commit": "abc", "alarms": alarms})
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    (tmp_path / "hacking").mkdir()
    for file in ("metrics.json", "metrics.csv", "cells.npz"):
        (tmp_path / "hacking" / file).write_bytes((tmp_path / "test" / file).read_bytes())
    (tmp_path / "recipes.md").write_text("before\n<!-- training -->\nold\n<!-- end training -->\nafter\n")
    return tmp_path


def build(folder):
    import report

    report.build(folder, folder / "page.md", folder / "recipes.md")


def test_page_is_built_from_recorded_numbers_alone(tmp_path):
    """Catches numbers that do not come from the files, an arm that is missing without being said so, and a page
    that can be built only once."""
    build(recorded(tmp_path))
    build(tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert (
        "took 3.0 hours" in page
        and "Training seeds: 0, 1, 2" in page
        and "| test | 6 × 2 × 8 | abc | a machine |" in page
        and "| hacking | 6 × 2 × 8 | not recorded |" in page
    )
    assert "| β=80 | 0.75" in page
    assert "| β=80 − β=0 | **-0.050" in page
    price = "2. The diversity reward restores diversity at a small price in quality"
    measured = "**fails** | **fails** | **holds** | **not measured** |"
    assert f"| {price} | β=80 | {measured}" in page, "by two encoders; quality by rules was not measured"
    assert f"| {price} | β=40 | **not measured** | **not measured** |" in page, "what validation chose"
    assert page.count("| 1. Distillation alone") == 1, "the diversity student plays no part"
    assert "| it is more diverse than the base | β=80 | -0.200" in page
    assert "diversity of base γ=3, quality of base γ=1: the claim's | (0.10" in page
    assert "| paper's estimator ¹ | 0.70" in page and "¹ One training seed" in page
    assert "| paper's estimator − β=20 ¹ | – |" in page and "| β=80 − β=0 |" in page, "three seeds: no mark"
    assert "| forward-kl | 1 | 7 (forward) | 7 (forward) |" in page
    assert "| offline − β=0 | – |" in page, "what was not evaluated is a dash"
    row = "| β = 80 | 3 | 2 ± 1 | 2 ± 1 | 0.75 ± 0 |"
    assert row in page, (
        "mean over seeds of 1, 2 and 3 nats, ± their standard deviation, then the last quarter"
    )
    recipes = (tmp_path / "recipes.md").read_text()
    assert (
        row in recipes
        and recipes.startswith("before\n")
        and recipes.endswith("after\n")
        and "old" not in recipes
    )
    assert "| β = 400 | 0 | 0.5 | 0.4 | 0.2 | 0.8 | – |" in page
    assert "| 25 | 25.5 | 0.4 | 0.2 | 0.8 | KL budget |" in page and "0.8 | quality, KL budget |" in page
    assert "not measured" in page
    for name in ("training", "test/front", "test/lerp-merges"):
        assert (tmp_path / f"{name}.svg").is_file() and (tmp_path / f"{name}.csv").is_file()


def test_a_point_is_dominated_in_both_metrics_or_not_at_all(tmp_path):
    """Catches ties, a merge that beats a point in one metric alone, and a flagged merge that beats anything."""
    from report import Arms, dominated

    results = Results.load(recorded(tmp_path) / "test")
    arms = Arms("base γ=1", "base γ=3", "β=0", "β=80", "merges", sweeps=["guidance on the base", "baselines"])
    xy = ("diversity_heldout", "adherence")
    assert dominated(results, arms, *xy) == (
        "- paper's estimator: LERP λ=0.5, LERP λ=1\n- by no merge: base γ=1, base γ=3"
    )
    results["LERP λ=0.5"].flags.append("broken")
    assert dominated(results, arms, *xy).startswith("- paper's estimator: LERP λ=1\n")


def test_arms_are_measured_along_the_way_from_where_they_started(tmp_path):
    """Catches a β that starts from the base, and steps of another arm."""
    from report import measured_along

    def row(name, y, series=None, step=None):
        cells = {"adherence": np.full((2, 1), y)}
        return SystemResult(System(name, single("x"), series=series, step=step), cells=cells)

    rows = [row("base", 0.6), row("base γ=3", 0.9)]
    rows += [
        row(f"β=0 from the base @{step}", 0.7 + step / 1000, "β=0 from the base", step) for step in (50, 100)
    ]
    rows += [row(f"β=40 @{step}", 0.7, "β=40", step) for step in (25, 50)]
    along = measured_along(Results(["a", "b"], rows, {}))
    assert {k: [(entry["step"], round(entry["adherence"], 3)) for entry in log] for k, log in along.items()} == {
        "β = 0 from the base": [(0, 0.6), (50, 0.75), (100, 0.8)],
        "β = 40": [(0, 0.8), (25, 0.7), (50, 0.7)],
    }  # fmt: skip
    assert measured_along(Results(["a", "b"], rows[:2] + rows[4:], {})) == {}, (
        "where β=40 started is not known"
    )


def test_quality_at_equal_diversity_is_read_between_the_sweep_s_points(tmp_path):
    """By hand: at 0.3 the line from (0.1, 0.8) to (0.5, 0.6) has 0.7; a student with 0.75 lies 0.05 above it."""
    from report import at_equal_diversity

    results = Results.load(recorded(tmp_path) / "test")
    assert at_equal_diversity(results, "β=80", "guidance on the base").estimate == pytest.approx(0.05)
    assert at_equal_diversity(results, "β=0", "guidance on the base").estimate == pytest.approx(0.0)
    assert at_equal_diversity(results, "β=99", "guidance on the base") is None


def test_the_chosen_student_keeps_half_of_the_gain(tmp_path):
    """Guidance lifts .6 to .8: β=80 with .75 keeps enough and is more diverse than β=0; one with .69 would not."""
    from report import chosen_on

    results = Results.load(recorded(tmp_path) / "test")
    students = {name: results[name] for name in ("β=0", "β=80")}
    for row in students.values():
        object.__setattr__(row.system, "series", "β")
    assert chosen_on(results) == "β=80"
    students["β=80"].cells["adherence"] -= 0.06
    assert chosen_on(results) == "β=0"


def test_page_without_a_test_sweep_is_refused(tmp_path):
    """The curves of the trainings are there before the sweeps are."""
    folder = recorded(tmp_path)
    (folder / "test" / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run experiment\.py first"):
        build(folder)
    assert (folder / "training.svg").is_file() and not (folder / "page.md").exists()
