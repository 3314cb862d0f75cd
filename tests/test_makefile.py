"""The Makefile: every target is explained, and an unfit machine is told why before anything starts."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*args, **kwargs):
    return subprocess.run(["make", *args], capture_output=True, text=True, timeout=60, cwd=ROOT, **kwargs)


def test_help_lists_every_target():
    """Catches a target added without its line of help."""
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    listed = set(re.findall(r"^  make (\S+) +\S", make("help").stdout, re.MULTILINE))
    assert listed == targets == phony
    assert {"demo", "test", "lint", "build", "help"} <= listed


def test_no_python_is_one_clear_error(tmp_path):
    """A bare machine without a usable Python learns what to install; no environment is begun."""
    result = make("setup", f"VENV={tmp_path}/venv", "PYTHON=")
    assert result.returncode != 0
    assert "error: no Python >= 3.11 with venv and pip was found; install one" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_an_old_python_is_refused(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what `sys.exit(sys.version_info < (3, 11))` gives on 3.10
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    result = make("setup", f"VENV={tmp_path}/venv", f"PYTHON={old}")
    assert result.returncode != 0
    assert f"PYTHON={old} is older than 3.11 or lacks venv" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_the_newest_usable_python_is_chosen(tmp_path):
    """An interpreter that cannot make an environment (Debian without python3-venv) is passed over."""
    for name, code in (("python3.13", 1), ("python3.12", 0), ("python3.11", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    result = make("-n", "setup", f"VENV={tmp_path}/venv", env=environment)
    assert f"python3.12 -m venv {tmp_path}/venv" in result.stdout


def test_torch_comes_first_and_without_a_local_version():
    """A `+cpu` in the constraints could only be installed where that build is offered."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    commands = make("-n", "setup", "VENV=/nonexistent/venv").stdout.splitlines()
    installs = [line for line in commands if "pip install" in line]
    assert "torch" in installs[0]
    assert all("-c constraints.txt" in line for line in installs)


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^exec make test </dev/null$", script.read_text(), re.MULTILINE)
    assert "make test" in (ROOT / "README.md").read_text()
