"""`diverse-cfg listen`: a blind listening test, from the clips of an evaluation to win rates."""

import argparse
from pathlib import Path

from diverse_cfg.assets import recipe_path
from diverse_cfg.cli.command import SEED, Command, number
from diverse_cfg.cli.quiet import quiet_libraries


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)

    make = actions.add_parser("make", help="write a study from the clips of an evaluation").add_argument
    make("study", help="folder to create")
    make("--config", required=True, help="YAML file, or recipe, of the evaluation that made the clips")
    make("--output", help="folder of the results, in place of the file's")
    make(
        "--pair",
        nargs=2,
        action="append",
        required=True,
        metavar=("A", "B"),
        help="systems to compare (repeatable)",
    )
    make(
        "--quality", type=number(int, 0), default=20, metavar="N", help="single clips compared (default: 20)"
    )
    make(
        "--diversity",
        type=number(int, 0),
        default=10,
        metavar="N",
        help="pairs of clips compared (default: 10)",
    )
    make("--seed", type=SEED, default=0, help="of sides and order (default: 0)")

    run = actions.add_parser("run", help="ask the questions on a local web page (needs gradio)").add_argument
    run("study")
    run("--host", default="127.0.0.1", help="0.0.0.0 lets others in your network listen")
    run("--port", type=number(int, 1, 65535), default=7860)
    run(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer as NAME, e.g. that of a proxy in front (repeatable)",
    )

    actions.add_parser("count", help="count the votes: win rates with intervals").add_argument("study")

    export = actions.add_parser(
        "webmushra", help="write the study as a configuration of webMUSHRA"
    ).add_argument
    export("study")
    export("--output", required=True, help="folder to create, to be copied over webMUSHRA's")
    export("--test-id", default="diverse_cfg", help="name of the configuration (default: diverse_cfg)")

    ratings = actions.add_parser(
        "import", help="add the ratings that webMUSHRA collected to the votes"
    ).add_argument
    ratings("study")
    ratings("ratings", help="results/<test id>/lms.csv")


def _run(args: argparse.Namespace) -> None:
    {"make": _make, "run": _serve, "count": _count, "webmushra": _export, "import": _import}[args.action](
        args
    )


def _make(args: argparse.Namespace) -> None:
    from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep
    from diverse_cfg.evaluation.results import Results
    from diverse_cfg.listening.study import load_trials, make_study
    from diverse_cfg.settings import read_settings

    quiet_libraries()
    changed = {"output": args.output} if args.output else {}
    config = SweepConfig.from_dict(read_settings(recipe_path(args.config)) | changed)
    if not (Path(config.output) / "metrics.json").is_file():
        raise FileNotFoundError(
            f"{config.output} holds no results: run `diverse-cfg evaluate --config {args.config}` first, or name "
            "their folder with --output"
        )
    results = Results.load(config.output)
    sweep, _ = build_sweep(config)
    folder = make_study(
        results,
        sweep,
        args.study,
        [tuple(pair) for pair in args.pair],
        num_quality=args.quality,
        num_diversity=args.diversity,
        seed=args.seed,
    )
    print(f"{len(load_trials(folder))} trials in {folder}; ask them with: diverse-cfg listen run {folder}")


def _serve(args: argparse.Namespace) -> None:
    from diverse_cfg.listening.app import serve

    serve(args.study, host=args.host, port=args.port, names=args.allow_host)


def _count(args: argparse.Namespace) -> None:
    from diverse_cfg.listening.study import win_rates

    rates = win_rates(args.study)
    if not rates:
        print("no votes yet")
    for rate in rates:
        whom = "new prompts and listeners" if rate.new_listeners else "new prompts, these listeners"
        print(
            f"{rate.kind}: {rate.system} against {rate.other}: win rate {rate.rate.text()} ({rate.wins} "
            f"wins, {rate.ties} ties, {rate.losses} losses on {rate.rate.num_prompts} prompts by "
            f"{rate.listeners} listeners{f'; 95 % interval for {whom}' if rate.rate.low is not None else ''})"
        )


def _export(args: argparse.Namespace) -> None:
    from diverse_cfg.listening.webmushra import export_study

    print(
        f"copy {args.output}/configs over webMUSHRA's: {export_study(args.study, args.output, args.test_id)}"
    )


def _import(args: argparse.Namespace) -> None:
    from diverse_cfg.listening.webmushra import import_ratings

    print(f"{import_ratings(args.study, args.ratings)} new votes")


COMMAND = Command(
    name="listen",
    summary="a blind listening test: is it better, is it more diverse",
    add_arguments=_add_arguments,
    run=_run,
    resume="every vote so far is on the disk; run it again to go on",
)
