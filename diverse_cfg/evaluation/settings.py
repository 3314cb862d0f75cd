"""Plain values, as a YAML file gives them, against the annotation of the setting that they fill.

An annotation is what the documentation says already; checking it here saves every setting a check of its own,
and a wrong value an hour of generating before it fails.
"""

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

_LISTS = (list, tuple, Sequence)
_WORDS = {
    str: "text",
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    types.NoneType: "nothing (null)",
}


def require_type(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value that is not of a setting's type.

    An integer is a number, true and false are not; any list may fill a tuple.

    Args:
        name: of the setting, for the message.
        value: what it was given.
        annotation: made of str, int, float, bool, None, Any, `|`, list, Sequence, tuple[X, ...] and dict.

    Raises:
        ValueError: with name, value and what is wanted.
    """
    if not _fits(value, annotation):
        raise ValueError(f"{name}={value!r} must be {_words(annotation)}")


def _fits(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation) or annotation, get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in _LISTS:
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if annotation in (int, float):
        numbers = int if annotation is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, annotation)


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin in _LISTS:
        return f"a list (each entry {_words(parts[0])})"
    return "settings by name" if origin is dict else _WORDS[annotation]
