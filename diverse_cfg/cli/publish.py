"""`diverse-cfg publish`: a checked model folder to the Hub, private, and only when asked twice."""

import argparse
from typing import Any

from diverse_cfg.cli.command import Command, refuse_idle


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", help="what `train` or `merge` wrote")
    add("repo_id", help="user/name on the Hub")
    add("--upload", action="store_true", help="send it; without this, only show what would be sent")
    add("--public", action="store_true", help="make the repository public; private by default")
    add("--merged", action="store_true", help="publish the full model that an adapter makes of its base")
    add("--base-model", help="Hub id of the base, where the folder names a place on this machine")
    add("--license", help="licence of the weights, where the base's is not known")
    add("--tag", action="append", default=[], help="one more tag for the card (repeatable)")
    add(
        "--sample",
        action="append",
        default=[],
        metavar="PROMPT",
        help="make a clip for the card, kept in the folder's samples/ (repeatable)",
    )
    add(
        "--results",
        nargs=2,
        metavar=("EVALUATION", "SYSTEM"),
        help="what `evaluate` wrote, and the name of this model's row, for the card's numbers",
    )
    add(
        "--space",
        metavar="USER/NAME",
        help="also make a Space with the page of `diverse-cfg play` for this model",
    )
    add(
        "--space-beside",
        metavar="USER/NAME",
        help="a published student (quality, say) from which the Space's λ moves to this one",
    )
    add("--space-wheel", metavar="FILE", help="our wheel (`make build`) for the Space, in place of PyPI's")
    add("--update", action="store_true", help="allow a repository that has files already")
    add(
        "--card",
        choices=["refuse", "keep", "overwrite"],
        default="refuse",
        help="what to do about another README.md in that repository",
    )
    add("--no-check", action="store_true", help="do not load and play the model first")


def _run(args: argparse.Namespace) -> None:
    from diverse_cfg.publishing import plan_space, publish, publish_space

    how = {"private": not args.public, "dry_run": not args.upload, "update": args.update, "card": args.card}
    if args.space is None:
        refuse_idle(args, "space_beside space_wheel", "without --space")
    else:  # what is wrong with it is said before a model is loaded
        beside = [args.space_beside] if args.space_beside else []
        models, options = [*beside, args.repo_id], {"license": args.license, "wheel": args.space_wheel}
        options["base"] = args.base_model
        plan_space(args.space, models, **options)
    result = publish(
        args.folder,
        args.repo_id,
        merged=args.merged,
        base_model=args.base_model,
        license=args.license,
        tags=args.tag,
        samples=args.sample,
        results=args.results,
        space=args.space,
        check=not args.no_check,
        **how,
    )
    _tell(result)
    if args.space is not None:
        _tell(publish_space(args.space, models, **options, **how))
    if not args.upload:
        print("\nNothing was sent. Add --upload to publish it.")


def _tell(result: Any) -> None:
    from diverse_cfg.publishing import UploadPlan

    if isinstance(result, UploadPlan):
        print(result.describe())
    else:
        print(f"{result.url} ({'private' if result.private else 'PUBLIC'}, {result.num_uploaded} files)")


COMMAND = Command(
    name="publish",
    summary="check a model folder and upload it to the Hub: a dry run and private unless told otherwise",
    add_arguments=_add_arguments,
    run=_run,
    resume="nothing is visible before everything arrived; run it again to go on",
)
