"""The experiments of the nano base from their shipped files, in miniature: every arm and every sweep, then the page."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diverse_cfg.evaluation.levels import LEVELS_FILE
from diverse_cfg.evaluation.results import Results

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "nano"
PLACE = re.compile(rb"/(?:work|tmp|home|root|Users)/")

pytestmark = pytest.mark.usefixtures("nano_recipe")


def miniature(name, tmp_path):
    """The shipped file with two updates a training, one seed, three prompts a sweep, and one second of music."""
    values = yaml.safe_load((RECIPE / name).read_text(encoding="utf-8"))
    small = {"max_steps": 2, "warmup_steps": 0, "save_steps": 1, "logging_steps": 1, "clip_seconds": 1.0}
    small |= {"num_generations": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    values["settings"] |= small
    values["seeds"] = [0]
    if "snapshots" in values:
        values["snapshots"] = [1]
    for arm in values["arms"].values():
        if "seeds" in arm:
            arm["seeds"] = [0]
        settings = arm.setdefault("settings", {})
        settings.pop("max_steps", None)
        if "eval_steps" in settings:
            settings["eval_steps"] = 1
    for sweep in values["sweeps"].values():
        sweep |= {
            "num_prompts": 4,
            "num_generations": 2,
            "clip_seconds": 1.0,
            "gallery_prompts": 0,
            "seeds": [0],
        }
    path = tmp_path / name
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture
def in_process(monkeypatch):
    """Tasks run in this process, since to load torch for each takes longer than the task; returns what was run."""
    import experiment

    started, run = [], subprocess.run

    def here(command, **options):
        if "--task" not in command:
            return run(command, **options)
        assert command[:2] == [sys.executable, experiment.__file__]
        started.append(command[command.index("--task") + 1])
        try:
            return subprocess.CompletedProcess(command, experiment.main(command[2:]))
        except PowerCut:
            return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(experiment.subprocess, "run", here)
    return started


class PowerCut(Exception):
    pass


@pytest.fixture
def power_cut(monkeypatch):
    """The second update of the first training of arm `beta-40` is cut off, once; returns the updates of that arm."""
    from diverse_cfg.trainer import CFGDiversityTrainer

    updates, step = [], CFGDiversityTrainer.training_step

    def training_step(self, *args, **kwargs):
        if "beta-40" in self.args.output_dir:
            updates.append(self.state.global_step)
            if updates == [0, 1]:
                raise PowerCut
        return step(self, *args, **kwargs)

    monkeypatch.setattr(CFGDiversityTrainer, "training_step", training_step)
    return updates


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experiment.yaml", "open.yaml"])
def test_a_shipped_experiment_runs_from_its_file(name, tmp_path, monkeypatch, capsys, in_process, power_cut):
    """Faults: a sweep that is refused after hours of training; a training that begins anew after an interruption; a
    recorded file that names a folder of the machine it was made on; a page that cannot be built of what was recorded.
    """
    import claims
    import experiment as module
    import report

    config, output, recorded = miniature(name, tmp_path), tmp_path / "runs", tmp_path / "recorded"
    asked = ["--config", str(config), "--output", str(output), "--recorded", str(recorded), "--jobs", "1"]
    assert module.main(asked) == 1 and "beta-40/0" in capsys.readouterr().err
    assert not recorded.exists(), "a part is no evidence"
    before = len(in_process)
    assert module.main(asked) == 0
    plan = module.Experiment.load(config)
    again = in_process[before:]
    assert again[0] == "beta-40/0" and {task.split(":")[0] for task in again[1:]} <= {"sweep", "halfway"}
    assert power_cut == [0, 1, 1], "it went on after its first update"
    assert module.main(asked) == 0 and len(in_process) == before + len(again), "nothing is done twice"

    runs = json.loads((recorded / "runs.json").read_text(encoding="utf-8"))
    assert {run["arm"] for run in runs} == set(plan.arms) and {run["steps"] for run in runs} == {2}
    for sweep in plan.sweeps:
        found = Results.load(recorded / sweep)
        assert found.usable == found.systems and len(found.prompts) == 4
    for path in (path for path in recorded.rglob("*") if path.is_file()):
        assert not PLACE.search(path.read_bytes()), f"{path} names a place on this machine"
    checkpoints = list(output.rglob("checkpoint-*"))
    assert not checkpoints, "they take several times a student's place"

    if name == "experiment.yaml":
        page, recipes = tmp_path / "page.md", tmp_path / "recipes.md"
        shutil.copyfile(RECIPE.parent / "README.md", recipes)
        report.build(recorded, page, recipes)
        assert "The five findings" in page.read_text(encoding="utf-8")
        return
    assert (recorded / "test" / LEVELS_FILE).is_file()
    assert "dying" in Results.load(recorded / "test").metrics
    assert claims.registered_in(recorded / "test") == plan.claims
    assert claims.main(["--config", str(config), "--recorded", str(recorded)]) == 0
    table = (recorded / "test" / "claims.md").read_text(encoding="utf-8")
    assert table.count("|\n") == len(plan.claims) + 2


@pytest.mark.slow
def test_the_page_is_what_the_recorded_numbers_say(tmp_path):
    """Faults: a page, or the README's paragraph, that was edited by hand or is older than its numbers."""
    import summary

    page, readme = tmp_path / "RESULTS.md", tmp_path / "README.md"
    shutil.copytree(RECIPE / "results", tmp_path / "results")
    shutil.copyfile(ROOT / "README.md", readme)
    summary.build(tmp_path / "results", page, readme)
    assert page.read_text(encoding="utf-8") == (RECIPE / "RESULTS.md").read_text(encoding="utf-8")
    assert readme.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").count("\n") <= 250


def test_no_file_of_the_repository_names_a_place_on_a_machine():
    """Catches results, cards and logs that hold the folder of the machine they were made on."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no clone of the repository")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert len(files) > 200
    named = [str(path) for path in files if path.is_file() and PLACE.search(path.read_bytes())]
    assert not named, named
