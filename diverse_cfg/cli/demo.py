"""`diverse-cfg demo`: the whole method on the shipped base, with a listening page at the end."""

import argparse

from diverse_cfg.cli.command import Command
from diverse_cfg.cli.quiet import quiet_libraries


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        default="demo-run",
        help="folder to write; one that the same command has begun is continued (default: demo-run)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run of under two minutes: everything happens, little is learnt",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the trainings (default: 0)")


def run_demo(args: argparse.Namespace) -> None:
    # Importing torch and transformers takes seconds: say something before.
    print("diverse-cfg demo: train, merge, generate, evaluate on the shipped base", flush=True)
    from diverse_cfg.evaluation import demo

    quiet_libraries()
    settings = demo.DemoSettings.quick(args.seed) if args.quick else demo.DemoSettings(seed=args.seed)
    demo.run_demo(args.output, settings, tell=lambda line: print(line, flush=True))


COMMAND = Command(
    name="demo",
    summary="run the whole method on the shipped base: train, merge, evaluate, listen",
    add_arguments=add_demo_arguments,
    run=run_demo,
    resume="what is complete is kept; run the same command again to go on",
)
