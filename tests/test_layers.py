"""The architecture as a test: imports point strictly down, and nothing is imported undeclared."""

import ast
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diverse_cfg"
family_words = runpy.run_path(str(ROOT / "benchmarks" / "house.py"))["family_words"]

# Lowest first. A module may import what stands before its own line, never from its own line or after it; the
# files of one folder may import each other. A new module needs a place here, chosen on purpose.
LAYERS = [
    ["functional", "assets", "atomic", "reading", "threads", "untrusted"],
    ["types", "provenance", "settings", "effects", "acoustics", "plotting"],
    ["config"],
    ["policies", "embeddings", "prompts"],
    ["rewards", "cards", "nano", "recordings"],
    ["facets", "subset"],
    ["merging"],
    ["callbacks"],
    ["trainer"],
    ["evaluation"],
    ["listening", "publishing"],
    ["playing"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# What is imported under another name than it is installed under.
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
# Installed with --no-deps, so that no extra may list it; `spaces` is there on a Space of the Hub only.
UNLISTED = {"audiocraft", "audiobox_aesthetics", "spaces"}


def module_files(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if path != package / "__init__.py")


def room(path: Path, package: Path) -> str:
    """Its name on the top floor: `policies` for `policies/stored.py`, `trainer` for `trainer.py`."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_names(path: Path) -> list[tuple[int, str]]:
    """Every (line, dotted module) that a file imports, also inside functions and `TYPE_CHECKING` blocks."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, "." * node.level + (node.module or "")))
            elif node.module == "diverse_cfg":
                found += [(node.lineno, f"diverse_cfg.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def layer_faults(package: Path) -> list[str]:
    faults = []
    for path in module_files(package):
        here = room(path, package)
        if here not in RANK:
            faults.append(f"{path.relative_to(package)}: no layer; give {here!r} a place in LAYERS")
            continue
        for line, name in imported_names(path):
            where = f"{path.relative_to(package)}:{line}"
            if name.startswith("."):
                faults.append(f"{where}: relative import; write `from diverse_cfg.…`")
                continue
            parts = name.split(".")
            if parts[0] != "diverse_cfg" or len(parts) == 1 or parts[1] == here:
                continue
            if parts[1] == "__version__":
                continue
            if parts[1] not in RANK:
                faults.append(f"{where}: imports {name}, which has no layer")
            elif RANK[parts[1]] >= RANK[here]:
                faults.append(f"{where}: {here} imports {name}, which is not below it")
    return faults


def test_imports_point_strictly_down():
    assert layer_faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("policies/stored.py", "from diverse_cfg.trainer import X", "policies imports diverse_cfg.trainer"),
        ("rewards.py", "from diverse_cfg.merging import X", "rewards imports diverse_cfg.merging"),
        ("types.py", "def f():\n    from diverse_cfg import cli", "types imports diverse_cfg.cli"),
        ("orphan.py", "import torch", "no layer"),
        ("types.py", "from .config import X", "relative import"),
    ],
)
def test_the_layer_test_sees(tmp_path, path, source, fault):
    """An arrow up or sideways, also inside a function, and a module without a layer are found."""
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    (tmp_path / "__init__.py").write_text("from diverse_cfg.cli import main")  # the lazy door is no room
    faults = layer_faults(tmp_path)
    assert len(faults) == 1
    assert fault in faults[0]


def test_families_are_known_in_their_folder_only():
    """Fault: a part or a class of MusicGen outside `policies/`, where another family has none."""
    faults = {
        str(path.relative_to(PACKAGE)): words
        for path in module_files(PACKAGE)
        if room(path, PACKAGE) != "policies"
        and (words := family_words(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert faults == {}
    assert family_words(ast.parse("from transformers import MusicgenConfig\nmodel.decoder.config")) == {
        "MusicgenConfig",
        ".decoder",
    }


def test_the_mathematics_needs_no_framework():
    """torch for tensors, scipy for distributions: no model, trainer or file format."""
    allowed = {"torch", "scipy", "diverse_cfg", *sys.stdlib_module_names}
    faults = [
        f"{path.name}:{line}: {name}"
        for path in module_files(PACKAGE / "functional")
        for line, name in imported_names(path)
        if name.split(".")[0] not in allowed
    ]
    assert faults == []


def test_every_import_is_a_declared_dependency():
    """Catches a package that is here by luck, as something else's dependency, and vanishes at the user's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *(r for rs in project["optional-dependencies"].values() for r in rs),
    ]
    declared = {re.split(r"[\[<>=!~; ]", r)[0].lower().replace("_", "-") for r in required}
    faults = []
    for path in module_files(PACKAGE):
        for line, name in imported_names(path):
            top = name.split(".")[0]
            distribution = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
            if top in sys.stdlib_module_names or top in {"diverse_cfg", "", *UNLISTED}:
                continue
            if distribution not in declared:
                faults.append(f"{path.relative_to(ROOT)}:{line}: {top}")
    assert faults == []
