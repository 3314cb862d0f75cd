"""Settings as people write them: a YAML file, read strictly, and values against the annotation that they fill.

An annotation is what the documentation says already; checking it here saves every setting a check of its own,
and a wrong value an hour of computing before it fails.
"""

import enum
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_LISTS = (list, tuple, Sequence)
_WORDS = {
    str: "text",
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    types.NoneType: "nothing (null)",
}


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: a name stands once and is text, and 1e-4 is a number as in YAML 1.2."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                shown = getattr(key, "value", None) or "null"
                raise yaml.MarkedYAMLError(
                    problem=f"the name {shown!r} is not text: name a setting, in quotes if need be",
                    problem_mark=key.start_mark,
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is set twice: keep one", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


# PyYAML reads 1e-4 as text, 0:1:0.05 as a number of base 60 and 010 as 8. Here numbers are those of YAML 1.2.
_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$",
    "float": r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$",
}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list("-+.0123456789")
    )


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """Settings of a YAML file; paths in it are relative to the working directory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, a name twice, or a name that is not text.
    """
    path = Path(path)
    try:
        return parse_settings(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """Settings of a YAML text, as `read_settings`.

    Raises:
        ValueError: see there; the message begins with `where`.
    """
    try:
        loader = _StrictLoader(text)
        loader.name = os.path.basename(where)
        values = loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold settings by name (name: value), not a {type(values).__name__}")
    return values


@cache
def field_types(owner: type) -> dict[str, Any]:
    """Field of a dataclass → its annotation."""
    hints = get_type_hints(owner)
    if "fsdp" in hints:  # transformers says text, and means true as well
        hints["fsdp"] |= bool
    return {field.name: hints[field.name] for field in fields(owner)}


def require_settings(
    values: Mapping[str, Any], annotations: Mapping[str, Any], where: str, prefix: str = ""
) -> None:
    """Refuse names that are no setting, and values of another type than their setting's.

    Args:
        values: settings by name.
        annotations: every setting's name and type.
        where: whose settings they are, for the message about a name.
        prefix: stands before the name in the message about a value.
    """
    unknown = [str(name) for name in values if name not in annotations]
    if unknown:
        raise ValueError(f"{where} has no setting {', '.join(unknown)}; known: {', '.join(annotations)}")
    for name, value in values.items():
        require_type(prefix + name, value, annotations[name])


def require_type(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value that is not of a setting's type.

    An integer is a number, true and false are not; any list may fill a tuple, a path fills text.

    Args:
        name: of the setting, for the message.
        value: what it was given.
        annotation: made of str, int, float, bool, None, Any, `|`, list, Sequence, tuple[X, ...], dict, Literal
            and classes.

    Raises:
        ValueError: with name, value and what is wanted.
    """
    if not _fits(value, annotation):
        quotes = " (YAML reads no, off, yes and on as true or false: put it in quotes)"
        hint = quotes if isinstance(value, bool) and _fits("", annotation) else ""
        raise ValueError(f"{name}={value!r} must be {_words(annotation)}{hint}")


def _fits(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation) or annotation, get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in _LISTS:
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if annotation in (int, float):
        numbers = Integral if annotation is int else Real
        return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, str | os.PathLike if annotation is str else annotation)


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is Literal or (isinstance(origin, type) and issubclass(origin, enum.Enum)):
        choices: Any = parts or origin
        return " or ".join(repr(getattr(choice, "value", choice)) for choice in choices)
    if origin in _LISTS:
        return f"a list (each entry {_words(parts[0])})"
    return "settings by name" if origin is dict else _WORDS.get(annotation) or f"a {annotation.__name__}"
