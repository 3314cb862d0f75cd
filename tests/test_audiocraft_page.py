"""recipes/audiocraft.md is run: its `bash` and `python` blocks, in order, in one empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "recipes" / "audiocraft.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_only_the_installation_is_not_run():
    assert [language for language, _ in BLOCKS] == ["console", "bash", "python"]
    assert re.sub(r" +#.*", "", BLOCKS[0][1]).splitlines() == [
        'pip install ".[audiocraft]"',
        "pip install --no-deps audiocraft==1.3.0",
    ]


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    from diverse_cfg import import_audiocraft

    try:
        import_audiocraft()
        languages = ["bash", "python"]
    except ImportError:
        languages = ["bash"]
    programs = tmp_path / ".bin"
    programs.mkdir()
    (programs / "diverse-cfg").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m diverse_cfg "$@"\n')
    (programs / "diverse-cfg").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for language, text in BLOCKS:
        if language not in languages:
            continue
        program = ["bash", "-euo", "pipefail"] if language == "bash" else [sys.executable]
        result = subprocess.run(
            [*program, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, f"{text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert (tmp_path / "student-audiocraft" / "state_dict.bin").is_file()
    assert (tmp_path / "mine-transformers" / "model.safetensors").is_file()
