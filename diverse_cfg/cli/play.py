"""`diverse-cfg play`: a page on this machine where a model is heard: a prompt, a slider, eight different ideas."""

import argparse
from pathlib import Path

from diverse_cfg.cli.command import Command, model_source, number
from diverse_cfg.cli.quiet import quiet_libraries


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a model (folder, Hub id or `nano`); a quality and a diversity student, between which λ moves; both "
        "with their base before them; or the folder of a demo",
    )
    add(
        "--base",
        help="base of the students, for guided clips beside theirs (default: the one that they record)",
    )
    add("--output", default="play-takes", help="folder of what is kept (default: play-takes)")
    add("--port", type=number(int, 1, 65535), default=7860, help="of 127.0.0.1 (default: 7860)")
    add("--device", help="torch device (default: a GPU if there is one)")
    add("--encoder", help="encoder of the map (default: nano's, the rewarded one for nano's students)")
    add("--open", action="store_true", help="open the page in the browser")


def _run(args: argparse.Namespace) -> None:
    models, base = [found for name in args.models for found in _models(name)], args.base
    if len(models) == 3 and base is None:
        base, *models = models
    if len(models) > 2:
        raise ValueError(
            f"{len(models)} models: name one, a quality and a diversity student, or these two after their base"
        )
    models, base = [model_source(model) for model in models], model_source(base) if base else None
    print("diverse-cfg play: loading", flush=True)  # torch, transformers and gradio take seconds
    quiet_libraries()
    from diverse_cfg.playing.page import serve
    from diverse_cfg.playing.player import Player

    player = Player(models, base=base, device=args.device, encoder=args.encoder)
    serve(player, args.output, port=args.port, inbrowser=args.open)


def _models(name: str) -> list[str]:
    """The two students of a demo's folder, or what is named itself."""
    students = [Path(name) / stage for stage in ("quality", "diversity")]
    return list(map(str, students)) if all((s / "config.json").is_file() for s in students) else [name]


COMMAND = Command(
    name="play",
    summary="hear a model on a local page: a prompt, a slider for variety, takes side by side (needs gradio)",
    add_arguments=_add_arguments,
    run=_run,
    resume="what was kept is in its folder; run it again to go on",
)
