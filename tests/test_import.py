"""Importing the package and asking for help is instant: nothing heavy is loaded before it is used."""

import ast
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diverse_cfg

ROOT = Path(__file__).parent.parent
HEAVY = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "sentence_transformers",
    "numpy",
    "scipy",
    "matplotlib",
]


def loaded_after(code: str) -> list[str]:
    """Which heavy modules a fresh interpreter has loaded after running `code`."""
    program = f"{code}\nimport sys\nprint('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "code",
    [
        "import diverse_cfg; dir(diverse_cfg); diverse_cfg.__version__",
        "import diverse_cfg; diverse_cfg.nano_path",
        "import diverse_cfg.prompts",
        "from diverse_cfg.cli import _build_parser; _build_parser().format_help()",
    ],
)
def test_nothing_heavy_is_loaded(code):
    """Catches a torch import at the top of a module that `import diverse_cfg` or the parser reaches."""
    assert loaded_after(code) == []


def test_the_probe_sees_a_heavy_import():
    assert "numpy" in loaded_after("import numpy")


def test_help_is_fast():
    """Half a second is the aim; the bound is generous because a busy machine is not a fault."""
    times = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "diverse_cfg", "--help"], cwd=ROOT, capture_output=True, check=True
        )
        times.append(time.monotonic() - start)
    assert min(times) < 2.0


def test_public_names_exist_and_are_known_to_type_checkers():
    """Catches a renamed function that is still promised, and an editor that does not know a public name."""
    promised = set(diverse_cfg.__all__) - {"__version__"}
    assert promised == set(diverse_cfg._PUBLIC)
    assert promised <= set(dir(diverse_cfg))
    tree = ast.parse((ROOT / "diverse_cfg" / "__init__.py").read_text())
    checked = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked == diverse_cfg._PUBLIC
    for name, module in diverse_cfg._PUBLIC.items():
        assert getattr(diverse_cfg, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nano_paht'"):
        _ = diverse_cfg.nano_paht
