"""The README is run: every `bash` and `python` block, in order, in one empty folder, as a reader would.

`console` blocks hold what a test must not do (set up a machine, publish to the Hub); they are checked against
a short list instead, so that no broken command can hide there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diverse_cfg.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    (match.group(1), README[: match.start()].count("\n") + 1, match.group(2))
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
EXECUTED = [block for block in BLOCKS if block[0] in ("bash", "python")]

# Shorter runs of the same commands. Each must still occur, so that the list cannot outlive the text.
SHORTER = {
    "--max_steps 160": "--max_steps 2",
    "num_prompts: 24": "num_prompts: 2",
    "--quality 20": "--quality 1 --diversity 1",
}
# What a console block may hold: set-up on a machine with a network, and what needs a Hub account.
CONSOLE = re.compile(
    r"git clone \S+|make (demo|test)|pip install .*|accelerate launch .*|diverse-cfg publish .*"
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The reader's folder and environment, with `diverse-cfg` and `python` on the path."""
    folder = tmp_path_factory.mktemp("reader")
    programs = folder / ".bin"
    programs.mkdir()
    for name, command in (("python", ""), ("diverse-cfg", "-m diverse_cfg")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    return folder, environment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "text"), [(b[0], b[2]) for b in EXECUTED], ids=[f"line {b[1]}" for b in EXECUTED]
)
def test_the_block_runs(reader, language, text):
    folder, environment = reader
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    program = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    result = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def test_nothing_hides_from_being_run():
    """Catches a command moved into a block that no test runs, and a block without a language."""
    assert {language for language, _, _ in BLOCKS} <= {"bash", "python", "console", "bibtex", "text"}
    assert {"bash", "python"} <= {language for language, _, _ in EXECUTED}
    lines = [line for language, _, text in BLOCKS if language == "console" for line in text.splitlines()]
    assert [line for line in lines if not CONSOLE.fullmatch(re.sub(r"\s+#.*", "", line))] == []
    for language, _, text in BLOCKS:
        assert language != "text" or "diverse-cfg " not in text


def test_shortened_runs_still_occur():
    assert [long for long in SHORTER if long not in README] == []


def test_the_commands_that_are_named_exist():
    """Catches a promise that was never registered, and a command that nobody is told about."""
    named = set(re.findall(r"diverse-cfg ([a-z][a-z-]+)", README))
    assert named == {command.name for command in COMMANDS}


def test_local_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", README)
    local = [a or b for a, b in targets if not (a or b).startswith(("http:", "https:", "#"))]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_files_of_the_story_exist():
    """Every `path/like/this.py` in backticks is a file of the package or of the repository."""
    files = re.findall(r"`([\w/.-]+\.(?:py|md|yaml|txt))`", README)
    assert files
    missing = [
        name for name in files if not (ROOT / name).exists() and not (ROOT / "diverse_cfg" / name).exists()
    ]
    assert missing == []


def test_it_stays_short():
    assert len(README.splitlines()) <= 160
