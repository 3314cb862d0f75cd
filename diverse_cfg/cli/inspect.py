"""`diverse-cfg inspect`: what a checkpoint is, and the proof that its training changed something."""

import argparse
import json

from diverse_cfg.cli.command import Command, model_source


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="folder or Hub id of a model or adapter, or `nano` for the shipped base")
    add("--base", help="what to compare with, where it is not the base that the checkpoint names")
    add("--json", action="store_true", help="print the report as JSON")


def _run(args: argparse.Namespace) -> None:
    from diverse_cfg.merging import format_report, inspect_checkpoint

    report = inspect_checkpoint(model_source(args.model), base=args.base and model_source(args.base))
    if args.json:
        # JSON has no NaN: a distance that is none becomes null.
        report = json.loads(json.dumps(report), parse_constant=lambda _: None)
        print(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(format_report(report))


COMMAND = Command(
    name="inspect",
    summary="show what a checkpoint is, how it was made, and how far it lies from its base",
    add_arguments=_add_arguments,
    run=_run,
)
