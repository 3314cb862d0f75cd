"""`--accelerate_config NAME --num_processes N` behind a command: it starts itself by accelerate, as `trl` does."""

import argparse
import os
from collections.abc import Sequence

from diverse_cfg.assets import accelerate_config
from diverse_cfg.settings import read_settings
from diverse_cfg.threads import available_cores

_ASKING = ("--accelerate_config", "--accelerate-config", "--num_processes", "--num-processes")
# Options of accelerate that are the trainer's too, and stay there.
SHARED = {
    *("--help", "-h", "--debug"),
    *("--gradient_accumulation_steps", "--gradient-accumulation-steps"),
}


def wanted(words: Sequence[str]) -> bool:
    """Whether a command line asks for accelerate's processes."""
    return any(word.partition("=")[0] in _ASKING for word in words)


def launch(command: str, words: Sequence[str]) -> None:
    """Run `diverse-cfg COMMAND` in accelerate's processes: its own options go to it, all others through.

    Raises:
        ValueError: no such configuration, one of a single process for several, or launched already.
        SystemExit: with the exit status of the first process that failed.
        KeyboardInterrupt: with the signal that ended it.
    """
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            "a launcher has started this process already: leave out --accelerate_config and --num_processes, or the "
            "launcher"
        )
    import subprocess

    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(*_ASKING[:2])
    named, words = first.parse_known_args(words)
    parser = launch_command_parser()
    ours, theirs = _divided(words, {*parser._option_string_actions} - SHARED)
    if named.accelerate_config is not None:
        theirs += ["--config_file", accelerate_config(named.accelerate_config)]
    args = parser.parse_args([*theirs, "--module", "diverse_cfg", command, *ours])
    config = read_settings(args.config_file) if args.config_file else {}
    processes = args.num_processes or config.get("num_processes", 1)
    if config.get("distributed_type") == "NO" and processes > 1:
        raise ValueError(
            f"{args.config_file} is for one process, not {processes}: choose --accelerate_config ddp, or "
            "multi_cpu without GPUs"
        )
    if os.environ.get("OMP_NUM_THREADS") == str(available_cores()):  # all of them belong to all processes
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))
    try:
        launch_command(args)
    except ChildFailedError as error:
        raise SystemExit(max(1, error.get_first_failure()[1].exitcode)) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(max(1, error.returncode)) from None
    except SignalException as error:
        raise KeyboardInterrupt(int(error.sigval)) from None
    except KeyboardInterrupt as interrupt:
        children = psutil.Process().children()
        for child in children if interrupt.args else ():  # Ctrl-C has reached them already
            child.terminate()
        psutil.wait_procs(children)
        raise


def _divided(words: Sequence[str], known: set[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the options in `known` with the values that follow them."""
    ours: list[str] = []
    theirs: list[str] = []
    side = ours
    for word in words:
        if word.startswith("--") or word in known:
            side = theirs if word.partition("=")[0] in known else ours
        side.append(word)
    return ours, theirs
