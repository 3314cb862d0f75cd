"""Strings from outside, made harmless in one place: names that become paths, and text that becomes a page.

A prompt, the name of a system or a value in somebody's `generation_config.json` may hold anything. Templates
escape every value unless a filter here says otherwise, so that a new placeholder is safe without a thought.
"""

import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
"""A token of the Hugging Face Hub."""

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = re.compile(r"\w[\w .+=-]{0,99}")
# Control characters, line separators, changes of writing direction, halves of letters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def checked_name(name: Any, what: str) -> str:
    """A name that becomes a file or folder as it is.

    Raises:
        ValueError: it could lead to another folder, be hidden, or be no file name at all.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} becomes a file name: use up to 100 letters, digits, spaces and . _ - + =, the first "
            "of them a letter, a digit or _"
        )
    return name


def inside(folder: str | os.PathLike, name: Any) -> Path:
    """The path of a file that a list in `folder` names.

    Raises:
        ValueError: the name leads out of the folder.
    """
    parts = Path(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or "\0" in name or Path(name).is_absolute():
        raise ValueError(
            f"{folder} lists the file {name!r}, which does not lie in that folder: it is not read; correct the list"
        )
    return Path(folder) / name


def slug(text: Any, length: int = 60, default: str = "clip") -> str:
    """Any text as a part of a file name: lower-case ASCII letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower())[:length].strip("-") or default


def markdown(value: Any) -> str:
    """Free text inside a line or table cell of Markdown: no HTML, links, cells, lists or code; one line."""
    flat = html.escape(plain(" ".join(str(value).split())), quote=False)
    # An underscore inside of a word means nothing there, and names are full of them.
    flat = re.sub(r"([\\`*|\[\]~#]|(?<!\w)_|_(?!\w))", r"\\\1", flat)
    return re.sub(r"^(\d*)([-+=.)])(?=[-+=]*(\s|$))", r"\1\\\2", flat)


def plain(text: Any) -> str:
    """Text for a terminal or a log: no tokens of the Hub, and no characters that steer a terminal."""
    return _UNPRINTABLE.sub("�", TOKEN.sub("hf_…", str(text)))


def frame_csv(frame: Any, **options: Any) -> str:
    """A pandas frame as CSV. Spreadsheets compute texts that begin like a formula, so that those get an apostrophe.

    Args:
        frame: the table.
        options: of `DataFrame.to_csv`.
    """
    return frame.map(_cell).to_csv(index=False, lineterminator="\n", **options)


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in tuple("=+-@"):
        try:
            float(value)
        except ValueError:
            return f"'{value}"
    return "" if value is None else value


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of the package with every value escaped, by the template's ending for HTML or for Markdown.

    Filters of Markdown: `number`, `code`, and `python` for a literal inside of a code block.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def escaped(value: Any) -> Markup:
        return value if isinstance(value, Markup) else Markup(markdown(value))

    def number(value: Any) -> Markup:
        if value is None:
            return Markup("—")
        return Markup(f"{value:.4g}") if isinstance(value, int | float) else escaped(value)

    def code(value: Any) -> Markup:
        harmless = re.fullmatch(r"[\w.+:/ -]+(=[\w.+:/ -]+)?", str(value))
        return Markup(f"`{value}`") if harmless else escaped(value)

    def python(value: Any) -> Markup:
        if not isinstance(value, Mapping):
            return Markup(json.dumps(value, ensure_ascii=False))
        return Markup("{" + ", ".join(f"{json.dumps(key)}: {item!r}" for key, item in value.items()) + "}")

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=escaped if template.endswith(".md.jinja") else None,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "code": code, "python": python}
    return environment.get_template(template).render(values)
