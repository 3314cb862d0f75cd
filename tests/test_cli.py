"""`diverse-cfg`: wrong input is one line and code 2, a bug keeps its traceback, an interruption is 130."""

import argparse
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import warnings

import pytest

from diverse_cfg.cli import COMMANDS, _build_parser, main
from diverse_cfg.cli.command import Command


def command_that(action, **kwargs):
    def run(args):
        return action(args)

    return Command("act", "do it", lambda parser: parser.add_argument("--number", type=int), run, **kwargs)


def fail(error):
    def action(args):
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("guidance_scale=-1 must be ≥ 1;\n  choose 3"), "guidance_scale=-1 must be ≥ 1; choose 3"),
        (
            FileNotFoundError(2, "No such file or directory", "x.csv"),
            "[Errno 2] No such file or directory: 'x.csv'",
        ),
        (FileExistsError("out exists; choose another --output"), "out exists; choose another --output"),
        (ImportError("needs pip install gradio"), "needs pip install gradio"),
        (ValueError(), "ValueError"),
        (type("OutOfMemoryError", (RuntimeError,), {})("ask for shorter clips"), "ask for shorter clips"),
    ],
)
def test_wrong_input_is_one_line(capsys, monkeypatch, error, line):
    monkeypatch.delenv("DIVERSE_CFG_DEBUG", raising=False)
    assert main(["act"], [command_that(fail(error))]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"diverse-cfg: error: {line}\n"
    assert captured.out == ""


def test_debug_shows_the_traceback(monkeypatch):
    commands = [command_that(fail(ValueError("bad")))]
    with pytest.raises(ValueError, match="bad"):
        main(["--debug", "act"], commands)
    monkeypatch.setenv("DIVERSE_CFG_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"):
        main(["act"], commands)


def test_a_bug_is_not_dressed_up_as_wrong_input():
    with pytest.raises(RuntimeError, match="shapes"):
        main(["act"], [command_that(fail(RuntimeError("shapes do not fit")))])
    with pytest.raises(ZeroDivisionError):
        main(["act"], [command_that(lambda args: 1 // 0)])
    with pytest.raises(ImportError):
        main(["act"], [command_that(fail(ImportError("gone", name="diverse_cfg.gone")))])


def test_an_interruption_says_how_to_go_on(capsys):
    command = command_that(fail(KeyboardInterrupt()), resume="the same command resumes")
    assert main(["act"], [command]) == 130
    assert capsys.readouterr().err == "\ndiverse-cfg: interrupted; the same command resumes\n"


def test_a_termination_is_an_interruption(capsys):
    """Catches a job that a scheduler or a script stops, and that leaves half of what it wrote."""
    cleaned, before = [], signal.getsignal(signal.SIGTERM)

    def run(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            cleaned.append(signal.getsignal(signal.SIGTERM))

    command = Command("act", "acts", lambda parser: None, run, resume="the same command resumes")
    assert main(["act"], [command]) == 143
    assert capsys.readouterr().err == "\ndiverse-cfg: interrupted; the same command resumes\n"
    assert cleaned == [signal.SIG_DFL], "a second signal ends the clean-up"
    assert signal.getsignal(signal.SIGTERM) == before


def test_warnings_and_progress_speak_plainly(capsys):
    """Catches source lines of ours between the user's lines, and a log that nobody sees."""

    def action(args):
        warnings.warn("clips are\n quiet", UserWarning, stacklevel=1)
        logging.getLogger("diverse_cfg.policies").info("sampling 3 clips")

    shown, logger = warnings.showwarning, logging.getLogger("diverse_cfg")
    before = (logger.level, list(logger.handlers))
    assert main(["act"], [command_that(action)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "diverse-cfg: warning: clips are quiet\nsampling 3 clips\n"
    assert captured.out == ""
    assert warnings.showwarning is shown
    assert (logger.level, logger.handlers) == before


def test_success_is_zero_and_arguments_arrive():
    seen = []
    assert main(["act", "--number", "3"], [command_that(seen.append)]) == 0
    assert seen[0].number == 3


def test_an_unknown_option_is_refused_unless_the_command_parses_itself(capsys):
    seen = []
    with pytest.raises(SystemExit) as stop:
        main(["act", "--nubmer", "3"], [command_that(seen.append)])
    assert stop.value.code == 2
    assert "unrecognized arguments: --nubmer 3 (see diverse-cfg act --help)" in capsys.readouterr().err
    assert seen == []
    assert main(["act", "--help", "--nubmer=3"], [command_that(seen.append, parses_rest=True)]) == 0
    assert seen[0].rest == ["--help", "--nubmer=3"]


def test_the_real_commands():
    """Every command has its own name, a line of help, and a parser that builds."""
    names = [command.name for command in COMMANDS]
    assert len(set(names)) == len(names) > 0
    text = _build_parser().format_help()
    assert all(f"\n    {name}" in text for name in names)
    choices = next(a for a in _build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert list(choices) == names


@pytest.mark.parametrize("name", [c.name for c in COMMANDS if not c.parses_rest])
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: diverse-cfg {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "flag", "values"),
    [
        ("generate", "--num-generations", "0 -1 2.5 nan 1e9 10000000"),
        ("generate", "--batch-size", "0 -3 x"),
        ("generate", "--seconds", "0 -1 nan inf"),
        ("generate", "--seed", "-1 1.5 18446744073709551616"),
        ("demo", "--seed", "-1 4294967296"),
        ("train-embedder", "--chunk-seconds", "0 -1 nan inf"),
        ("train-embedder", "--guidance-scale", "0.5 nan inf"),
        ("listen run study", "--port", "0 -1 65536"),
        ("listen make study", "--quality", "-1 nan 1e9"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(command, flag, values, capsys):
    """Fault: a traceback, hours of work or a full memory for a number that makes no sense."""
    for value in values.split():
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), flag, value])
        assert stop.value.code == 2
        [error] = capsys.readouterr().err.splitlines()
        assert error.startswith(f"diverse-cfg: error: argument {flag}: {value!r} must be ")


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
def test_freed_memory_is_used_again():
    """Catches a call that does nothing, and one that overrules the user's own MALLOC_ settings."""
    program = (
        "import resource, torch; from diverse_cfg.cli.memory import keep_freed_memory; keep_freed_memory()\n"
        "def faults():\n"
        " before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        " for _ in range(10): torch.ones(2**24)\n"
        " return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(faults())"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def page_faults(**variables):
        command = [sys.executable, "-c", program]
        return int(subprocess.run(command, env=plain | variables, capture_output=True, check=True).stdout)

    assert 10 * page_faults() < page_faults(MALLOC_ARENA_MAX="8")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    """Fault: `diverse-cfg recipes | head -1` ends in an error message."""
    command = f"{sys.executable} -m diverse_cfg recipes | head -1; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert found.stderr == "" and found.stdout.startswith("--recipe NAME")
