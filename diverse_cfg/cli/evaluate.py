"""`diverse-cfg evaluate`: a sweep over systems, from a YAML file to tables, figures and a page to listen."""

import argparse

from diverse_cfg.assets import recipe_path
from diverse_cfg.cli.command import Command
from diverse_cfg.cli.quiet import quiet_libraries


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--config",
        "--recipe",
        metavar="YAML",
        required=True,
        help="systems, prompts, metrics: a file (see diverse_cfg.evaluation) or a recipe (diverse-cfg recipes)",
    )
    add("--output", help="folder of the results, in place of the file's")
    add("--device", help="torch device (default: a GPU if there is one)")
    add("--no-gallery", action="store_true", help="no page to listen, tables and figures only")


def _run(args: argparse.Namespace) -> None:
    from diverse_cfg.settings import read_settings

    overrides = {
        "output": args.output,
        "device": args.device,
        "gallery_prompts": 0 if args.no_gallery else None,
    }
    settings = read_settings(recipe_path(args.config)) | {
        key: v for key, v in overrides.items() if v is not None
    }
    if args.no_gallery:
        settings.pop("gallery_generations", None)

    from diverse_cfg.evaluation.protocol import SweepConfig
    from diverse_cfg.evaluation.report import evaluate

    quiet_libraries()
    results = evaluate(SweepConfig.from_dict(settings))
    print(results.table())
    page = "" if args.no_gallery else " and index.html"
    print(f"\nresults, figures{page}: {settings['output']}")
    failed = [row.system.name for row in results.systems if not row.ok]
    if failed:
        raise ValueError(f"{len(failed)} of {len(results.systems)} systems failed: {', '.join(failed)}")


COMMAND = Command(
    name="evaluate",
    summary="measure systems against each other: quality, diversity, cost, with intervals",
    add_arguments=_add_arguments,
    run=_run,
    resume="what was generated and computed is kept; run the same command again to go on",
)
