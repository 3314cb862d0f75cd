"""The rollout benchmark runs and writes a page that says what it was taken on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    """A renamed function or option would otherwise show when somebody next asks for figures."""
    command = [sys.executable, str(ROOT / "benchmarks" / "rollout.py"), "--shape", "tiny", "--frames", "6"]
    command += ["--batch", "2", "--rounds", "1", "--bandwidth", "20", "--write", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    rows = json.loads((tmp_path / "rollout-tiny-cpu.json").read_text())["rows"]
    assert [(row["guidance_scale"], row["variant"]) for row in rows] == [
        (guidance_scale, variant)
        for guidance_scale in (1.0, 3.0)
        for variant in ("stock", "float32", "bfloat16")
    ]
    assert all(row["ms_per_step"] > 0 for row in rows)
    page = (tmp_path / "rollout-tiny-cpu.md").read_text()
    assert "× bandwidth limit" in page
    assert "- commit: " in page
