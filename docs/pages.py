"""What mkdocs builds the site from: the repository's Markdown where it lies, and a reference made from the code.

A hook of mkdocs (`hooks` in mkdocs.yml). Every page has its path in the repository as its address, which is what
the links between the pages, and to their pictures, say.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_PICTURE = re.compile(r"\]\(([^)\s]+\.(?:svg|png))\)")


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' list of files, with ours in the place of what it found in docs/."""
    from mkdocs.structure.files import File

    for file in [file for file in files if not file.src_uri.startswith("assets/")]:
        if Path(file.abs_src_path or "").is_relative_to(ROOT / "docs"):
            files.remove(file)
    generated = {"docs/commands.md": commands, "docs/python.md": python}
    for page in pages(config.nav):
        if page in generated:
            files.append(File.generated(config, page, content=generated[page]()))
            continue
        if not (ROOT / page).is_file():
            continue  # mkdocs says so
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
        for picture in _PICTURE.findall((ROOT / page).read_text(encoding="utf-8")):
            path = os.path.normpath(Path(page).parent / picture)
            if files.get_file_from_path(path) is None and (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A list may follow a line of text at once, as everywhere but in Python's Markdown."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"^([^\s|>#-].*\n)(?=- )", r"\1\n", text, flags=re.MULTILINE) for text in parts[::2]]
    return "".join(parts)


def pages(nav: Any) -> Iterator[str]:
    """The paths of a navigation."""
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(inner)


def commands() -> str:
    """A page with what `--help` says of every command."""
    sys.path.insert(0, str(ROOT))
    os.environ["COLUMNS"] = "100"
    from diverse_cfg.cli import COMMANDS, _build_parser

    lines = ["# Commands", "", *_block(_build_parser().format_help())]
    subparsers = _subparsers(_build_parser())
    for command in COMMANDS:
        lines += ["", f"## diverse-cfg {command.name}", ""]
        if command.parses_rest:  # its parser is TRL's
            words = [sys.executable, "-m", "diverse_cfg", command.name, "--help"]
            lines += _block(
                subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            )
            continue
        lines += _block(subparsers[command.name].format_help())
        for name, parser in _subparsers(subparsers[command.name]).items():
            lines += ["", f"### diverse-cfg {command.name} {name}", "", *_block(parser.format_help())]
    return "\n".join(lines) + "\n"


def python() -> str:
    """A page with the docstring of every public name."""
    sys.path.insert(0, str(ROOT))
    from diverse_cfg import _PUBLIC

    lines = [
        "# Python",
        "",
        "Each is imported from `diverse_cfg` itself: `from diverse_cfg import load_policy`.",
    ]
    for name, module in _PUBLIC.items():
        lines += ["", f"::: {_defined(module, name)}"]
    return "\n".join(lines) + "\n"


def _defined(module: str, name: str) -> str:
    """Where a public name is defined, which may be a module that its own imports it from."""
    path = ROOT / module.replace(".", "/")
    file = path.with_suffix(".py")
    text = (file if file.is_file() else path / "__init__.py").read_text(encoding="utf-8")
    if found := re.search(
        rf"^from (diverse_cfg\.\S+) import (?:[^\n(]*|\([^)]*)\b{name}\b", text, re.MULTILINE
    ):
        return _defined(found[1], name)
    return f"{module}.{name}"


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def _block(text: str) -> list[str]:
    return ["```text", text.rstrip(), "```"]
