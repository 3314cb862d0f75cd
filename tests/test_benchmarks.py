"""The benchmarks of a step, of importing and of busy machines run, and write pages that say what they were taken on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    subprocess.run(command, check=True, env=environment, capture_output=True)


@pytest.mark.slow
def test_the_step_benchmark_runs(tmp_path):
    """Faults: a part of the trainer that is renamed and so no longer timed; a backend that is never used."""
    case = ["--shape", "tiny", "--prompts", 1, "--generations", 3, "--frames", 6, "--rounds", 1]
    run("step.py", *case, "--grow-prompts", 2, "--grow-generations", "--grow-frames", "--write", tmp_path)
    rows = json.loads((tmp_path / "step-cpu.json").read_text())["rows"]
    assert [(row["prompts"], row["backend"]) for row in rows] == [
        (1, "stock"), (1, "ours"), (2, "stock"), (2, "ours")
    ]  # fmt: skip
    for row in rows:
        unused = {part for part, seconds in row["parts"].items() if not seconds > 0}
        assert not unused - {"refresh"}
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=1e-6)
    page = (tmp_path / "step-cpu.md").read_text()
    assert "- commit: " in page and "- load average before and after: " in page


@pytest.mark.slow
def test_the_import_benchmark_runs(tmp_path):
    run("import_time.py", "--rounds", 1, "--write", tmp_path)
    rows = json.loads((tmp_path / "import_time.json").read_text())["rows"]
    seconds = {row["what"]: row["seconds"] for row in rows}
    assert next(iter(seconds)) == "import transformers"
    assert seconds["import diverse_cfg"] < seconds["import transformers"]
    assert "- commit: " in (tmp_path / "import_time.md").read_text()


@pytest.mark.slow
def test_the_benchmark_of_busy_machines_runs(tmp_path):
    run(
        "busy.py",
        "--shape",
        "tiny",
        "--batch",
        2,
        "--frames",
        6,
        "--busy",
        0,
        1,
        "--rounds",
        1,
        "--write",
        tmp_path,
    )
    rows = json.loads((tmp_path / "busy-tiny.json").read_text())["rows"]
    assert [row["busy"] for row in rows] == [0, 1]
    assert all(seconds > 0 for row in rows for times in row["times"] for seconds in times.values())
    assert "| 1 | " in (tmp_path / "busy-tiny.md").read_text()
