"""What a command of `diverse-cfg` is made of, and the few argument helpers that commands share."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diverse_cfg.assets import source


@dataclass(frozen=True)
class Command:
    """One subcommand. Its module imports only the standard library; what is heavy, `run` does.

    Args:
        name: as typed after `diverse-cfg`.
        summary: one line for `diverse-cfg --help`.
        add_arguments: adds the options to the subparser.
        run: does the work with the parsed options; wrong input raises a `ValueError` or `OSError`.
        resume: what to tell somebody who interrupted it.
        parses_rest: the command has its own parser; `run` finds what it did not know in `args.rest`.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    resume: str = "what was written so far is kept; run the command again to start over"
    parses_rest: bool = False


def model_source(value: str) -> str:
    """A model argument as the loaders take it: `nano` stands for the base that is shipped with us.

    Raises:
        ValueError: neither a folder nor a Hub id.
    """
    if not value:  # a variable of a shell that is not set, say; as a path it is this folder
        raise ValueError("the name of a model is empty: name a folder, a Hub id (owner/name) or nano")
    if value != "nano" and "/" not in value and not Path(value).exists():
        raise ValueError(f"there is no folder {value} (a Hub id is owner/name, the shipped base is nano)")
    return source(value)


def prompt_source(value: str) -> str:
    """A prompt dataset as `load_prompts` takes it: `nano` and `nano-open` stand for those that are shipped."""
    return source(value, "prompts")


def number(kind: type, least: float, most: float = 10**6, *, above: bool = False) -> Callable[[str], Any]:
    """A number within bounds, as `type=` of an option.

    Args:
        kind: int or float.
        least: the smallest.
        most: the largest; an infinite one is still finite.
        above: `least` itself is too small.
    """

    def parse(text: str) -> Any:
        words = "an integer" if kind is int else "a number"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or value > most or math.isinf(value):
            lower = f"{'above' if above else 'of at least'} {least:g}"
            upper = "" if math.isinf(most) else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {words} {lower}{upper}")
        return value

    return parse


SEED = number(int, 0, 2**32 - 1)


def refuse_idle(args: argparse.Namespace, names: str, where: str) -> None:
    """Refuse options that were typed and would do nothing.

    Args:
        args: the parsed options; what was not typed is None, False or empty.
        names: of options, with spaces between them.
        where: in which case they do nothing, and what would make them act.

    Raises:
        ValueError: with the option and the case.
    """
    for name in names.split():
        value = getattr(args, name)
        if value is not None and value is not False and value != []:
            shown = "" if value is True else f" {value}"
            raise ValueError(f"--{name.replace('_', '-')}{shown} has no effect {where}: leave it out")
