"""The loss benchmark runs and writes what it prints."""

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loss.py"


def test_tiny_run_is_written_with_its_environment(tmp_path, capsys):
    """Catches a benchmark that no longer fits the loss it measures, or results without machine and commit."""
    benchmark = runpy.run_path(str(SCRIPT))
    benchmark["main"](["--shape", "tiny", "--chunk-size", "16", "--rounds", "2", "--write", str(tmp_path)])
    record = json.loads((tmp_path / "loss-cpu.json").read_text())
    assert {"device", "commit", "torch", "threads"} <= record["environment"].keys()
    at_once, chunked = record["rows"]
    assert at_once["chunk_size"] is None and chunked["chunk_size"] == 16
    assert chunked["peak_logits_tensors"] < at_once["peak_logits_tensors"]
    low, high = chunked["speedup_spread"]
    assert low <= chunked["speedup"] <= high
    assert capsys.readouterr().out.splitlines()[0] in (tmp_path / "loss-cpu.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss-cpu.json", "loss-cpu.md"]
