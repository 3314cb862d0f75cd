"""recipes/jobs: one file for one rented GPU, run whole on nano."""

import runpy
import tomllib
from pathlib import Path

import pytest

from diverse_cfg.assets import recipes
from diverse_cfg.settings import read_settings

ROOT = Path(__file__).parent.parent
JOB = ROOT / "recipes" / "jobs" / "musicgen_small.py"


def test_the_metadata_names_this_package():
    """Fault: `uv run` cannot read the header, or installs something else."""
    lines = JOB.read_text(encoding="utf-8").split("# ///")[1].splitlines()[1:]
    metadata = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    assert metadata["dependencies"][0] == "diverse-cfg[eval]" and "eval" in project["optional-dependencies"]
    assert (JOB.parent / metadata["tool"]["uv"]["sources"]["diverse-cfg"]["path"]).resolve() == ROOT


def test_a_step_has_the_recipes_clips():
    """Fault: parts that fit the card and add up to another batch than the recipe's."""
    job = runpy.run_path(str(JOB))
    for student in job["STUDENTS"]:
        recipe = read_settings(recipes()[f"musicgen-small/{student}-lora"])
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        batch, parts = (recipe[name] for name in names)
        assert job["CARD"][names[0]] * job["CARD"][names[1]] == batch * parts
        assert job["CARD"][names[0]] % recipe["num_generations"] == 0


@pytest.mark.slow
def test_the_whole_job_runs_on_nano(tmp_path, monkeypatch, capsys):
    """Fault: a command that is refused after hours of training, or results without a row."""
    monkeypatch.chdir(tmp_path)
    job = runpy.run_path(str(JOB))
    job["main"](["--smoke", "--output", "job"])
    shown = capsys.readouterr().out
    assert "user/musicgen-small-diverse-cfg (private" in shown  # a plan, nothing is sent
    page = (tmp_path / "job" / "results.md").read_text(encoding="utf-8")
    assert "| musicgen-small/diversity-lora |" in page and "| base γ=3 |" in page and "| merge |" in page
    job["main"](["--smoke", "--output", "job"])  # begun again, nothing is trained twice
    assert "diverse-cfg train" not in capsys.readouterr().out
