"""`diverse-cfg`: a thin launcher over what is importable from the package.

Each command lives in a module of this folder as a pair `_add_arguments` / `_run` and a `COMMAND`; to add
one, write the module and name it in `COMMANDS`. Nothing heavy is imported before a command runs, so help is
instant.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from diverse_cfg import __version__
from diverse_cfg.cli import (
    convert,
    demo,
    evaluate,
    finetune,
    generate,
    inspect,
    listen,
    merge,
    play,
    publish,
    recipes,
    train,
    train_embedder,
)
from diverse_cfg.cli.command import Command
from diverse_cfg.cli.memory import keep_freed_memory
from diverse_cfg.threads import available_cores
from diverse_cfg.untrusted import plain

_IN_ORDER = (
    *(demo, finetune, train, generate, merge, evaluate, play, listen, inspect, convert, publish),
    *(train_embedder, recipes),
)
COMMANDS: tuple[Command, ...] = tuple(module.COMMAND for module in _IN_ORDER)

# What a person can put right: one line, no traceback. Everything else is our bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error, without twenty lines of usage before it."""

    def error(self, message: str) -> NoReturn:
        where = "" if "--help)" in message else f" (see {self.prog} --help)"
        self.exit(2, f"diverse-cfg: error: {plain(message)}{where}\n")


def _build_parser(commands: Sequence[Command] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of `diverse-cfg` with one subparser per command."""
    parser = _Parser(
        prog="diverse-cfg",
        description="Train, merge, evaluate and publish MusicGen models that need no guidance at inference.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diverse-cfg {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error (also DIVERSE_CFG_DEBUG=1)"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in commands:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            add_help=not command.parses_rest,
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run one command.

    Returns:
        0; 2 after wrong input (one line on stderr); 130 after Ctrl-C, 143 after SIGTERM.
    """
    parser = _build_parser(commands)
    args, rest = parser.parse_known_args(argv)
    command = next(command for command in commands if command.name == args.command)
    if rest and not command.parses_rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (see diverse-cfg {command.name} --help)")
    args.rest = rest
    keep_freed_memory()
    if (cores := available_cores()) < (os.cpu_count() or 1):  # torch does not see a container's quota
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    debug = args.debug or os.environ.get("DIVERSE_CFG_DEBUG", "") not in ("", "0")
    try:
        with _speaking_plainly(), _terminated_like_interrupted():
            command.run(args)
    except BrokenPipeError:  # `diverse-cfg recipes | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed
        return 128 + signal.SIGPIPE
    except (*USER_ERRORS, RuntimeError) as error:
        # By its name: torch's class, whose import takes a second, and nothing else that is a RuntimeError.
        ours = isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError"
        ours |= str(getattr(error, "name", "")).startswith("diverse_cfg")  # a module of ours is missing
        if debug or ours:
            raise
        message = plain(" ".join(str(error).split())) or type(error).__name__
        print(f"diverse-cfg: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if debug:
            raise
        print(f"\ndiverse-cfg: interrupted; {command.resume}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return 0


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does; a second one ends at once.

    It is what stops a job of a shell script, which ignores Ctrl-C, and what schedulers send.
    """

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _speaking_plainly() -> Iterator[None]:
    """Warnings as one line without our source code, and the package's own log, both on stderr.

    Kept quiet: notices for programmers.
    """
    logger = logging.getLogger("diverse_cfg")
    handler, level = logging.StreamHandler(), logger.level
    handler.format = lambda record: plain(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        usual = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            if not issubclass(category, UserWarning):
                return usual(message, category, filename, lineno, file, line)
            print(f"diverse-cfg: warning: {plain(' '.join(str(message).split()))}", file=file or sys.stderr)

        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
