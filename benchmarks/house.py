"""How much there is to read: the figures that CONTRIBUTING holds the package to, printed in one table.

    make house                                 # this tree
    python benchmarks/house.py --root OTHER    # another checkout of it, with the same rules

One training step counts the files of which a function runs between the begin and the end of an optimiser step
of a tiny run, the sampler included. Words of a model family are identifiers of the code; comments and texts may
name it.
"""

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FAMILY = re.compile(r"Musicgen\w*|EncodecModel|T5\w*")
PARTS = {"decoder", "audio_encoder", "text_encoder", "enc_to_dec_proj"}
SETTINGS = ("args", "settings")  # whose attributes are options, not parts of a model
POLICIES = ("policies",)

STEP = """
import json, sys, tempfile
from pathlib import Path
from transformers import TrainerCallback
import diverse_cfg
from diverse_cfg.assets import nano_path

package = str(Path(diverse_cfg.__file__).parent)
files = set()

def watch(frame, event, argument):
    name = frame.f_code.co_filename
    if event == "call" and name.startswith(package) and frame.f_code.co_name != "<module>":
        files.add(name)

class Watch(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        sys.setprofile(watch)
    def on_step_end(self, *args, **kwargs):
        sys.setprofile(None)

with tempfile.TemporaryDirectory() as folder:
    args = diverse_cfg.CFGDiversityConfig(
        folder, max_steps=2, per_device_train_batch_size=4, num_generations=4, clip_seconds=0.4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no", audio_samples=0,
    )
    prompts = ["a slow melody on a flute", "a fast melody on a piano"]
    diverse_cfg.CFGDiversityTrainer(
        str(nano_path()), args=args, train_dataset=prompts, callbacks=[Watch()]
    ).train()
print("FILES", json.dumps(sorted(files)))
"""


def sources(folder: Path) -> list[Path]:
    """The Python files below a folder."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def lines(paths: list[Path]) -> int:
    """Lines of all of them."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def definitions(tree: ast.Module) -> list[str]:
    """Public names that a module defines at its top."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def family_words(tree: ast.Module) -> set[str]:
    """Identifiers that only make sense for one family of models."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in PARTS:
            option = isinstance(node.value, ast.Name) and node.value.id in SETTINGS
            found.update(set() if option else {"." + node.attr})
        names = [node.id] if isinstance(node, ast.Name) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        found.update(name for name in names if FAMILY.fullmatch(name))
    return found


def functions(tree: ast.Module) -> Iterator[int]:
    """Length of every function, its docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            yield node.end_lineno - node.lineno + 1


def words_for_people(text: str, tree: ast.Module) -> int:
    """Lines that are comments or docstrings."""
    total = sum(line.strip().startswith("#") for line in text.splitlines())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        match node.body[:1]:
            case [ast.Expr(value=ast.Constant(value=str())) as first]:
                total += (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def training_step(root: Path) -> list[Path]:
    """Files of the package of which a function runs during two optimiser steps."""
    offline = {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-c", STEP],
            cwd=folder,
            env=os.environ | offline,
            text=True,
            capture_output=True,
        )
    found = re.search(r"^FILES (.*)$", run.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"the training step did not run:\n{run.stderr[-2000:]}")
    return [Path(name) for name in json.loads(found.group(1))]


def measure(root: Path) -> dict[str, str]:
    """Every figure of the table, as text."""
    package = root / "diverse_cfg"
    paths = sources(package)
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    outside = {
        path: words
        for path, tree in trees.items()
        if path.relative_to(package).parts[0] not in POLICIES and (words := family_words(tree))
    }
    lengths = [length for tree in trees.values() for length in functions(tree)]
    people = sum(words_for_people(texts[path], trees[path]) for path in paths)
    step, evaluation = training_step(root), sources(package / "evaluation")
    widest = [len(line) for text in texts.values() for line in text.splitlines()]
    return {
        "lines of the package": f"{lines(paths):,} in {len(paths)} files",
        "public top-level definitions": str(sum(len(definitions(tree)) for tree in trees.values())),
        "one training step": f"{len(step)} files, {lines(step):,} lines",
        "evaluation/": f"{lines(evaluation):,} lines in {len(evaluation)} files",
        "words of a model family outside its folder": (
            f"{sum(map(len, outside.values()))} in {len(outside)} files"
        ),
        "tests": f"{lines(sources(root / 'tests')):,} lines",
        "mean length of a function": f"{statistics.mean(lengths):.1f} lines, longest {max(lengths)}",
        "comments and docstrings": f"{people / lines(paths):.1%} of the lines",
        "longest lines": f"{max(widest)} characters; {sum(w > 105 for w in widest)} above 105",
        "largest file": f"{max(text.count(chr(10)) for text in texts.values())} lines",
    }


def main() -> None:
    """Print the table, and with --step the files of a training step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="checkout to measure")
    parser.add_argument("--step", action="store_true", help="list the files of a training step")
    args = parser.parse_args()
    root = args.root.resolve()
    print("| figure | value |\n|---|---|")
    for name, value in measure(root).items():
        print(f"| {name} | {value} |")
    if args.step:
        for path in training_step(root):
            print(f"{lines([path]):5d} {path.relative_to(root)}")


if __name__ == "__main__":
    main()
