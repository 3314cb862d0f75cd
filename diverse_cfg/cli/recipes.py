"""`diverse-cfg recipes`: the recipes and launch configurations that are installed: listed, shown, copied."""

import argparse
from pathlib import Path

from diverse_cfg.assets import accelerate_config, recipe_path, recipes
from diverse_cfg.atomic import write_text
from diverse_cfg.cli.command import Command

_LAUNCH = "accelerate/"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action")
    actions.add_parser("list", help="name every recipe and launch configuration (what no action does)")
    show = actions.add_parser("show", help="print one").add_argument
    show("name", help="as listed, e.g. musicgen-small/quality or accelerate/fsdp")
    copy = actions.add_parser("copy", help="copy one, or all of one folder, to change them").add_argument
    copy("name", help="as listed, or a folder, e.g. musicgen-small")
    copy("folder", help="where to; nothing is written over")


def _run(args: argparse.Namespace) -> None:
    {"list": _list, "show": _show, "copy": _copy}[args.action or "list"](args)


def _list(_: argparse.Namespace) -> None:
    launch = {_LAUNCH + name: path for name, path in recipes("accelerate").items()}
    for title, found in (("--recipe NAME", recipes()), ("--accelerate_config NAME", launch)):
        print(f"{title}:")
        for name, path in found.items():
            line = _read(path).partition("\n")[0].removeprefix("# ")
            print(f"  {name.removeprefix(_LAUNCH):36} {line.partition('. ')[0].rstrip('.')}")


def _show(args: argparse.Namespace) -> None:
    print(_read(_find(args.name)), end="")


def _copy(args: argparse.Namespace) -> None:
    """Raises: FileExistsError: a file of that name is there."""
    folder = args.name.strip("/")
    within = [path for name, path in recipes().items() if name.startswith(f"{folder}/")]
    chosen = within or list(recipes(folder).values() if folder + "/" == _LAUNCH else [_find(args.name)])
    targets = [Path(args.folder) / path.name for path in chosen]
    if there := [str(target) for target in targets if target.exists()]:
        raise FileExistsError(f"{', '.join(there)}: exists already; choose another folder, or remove it")
    for path, target in zip(chosen, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        print(write_text(target, _read(path)))


def _find(name: str) -> Path:
    launch = name.startswith(_LAUNCH)
    return Path(accelerate_config(name.removeprefix(_LAUNCH)) if launch else recipe_path(name))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


COMMAND = Command(
    name="recipes",
    summary="list, show or copy the recipes and launch configurations that are installed",
    add_arguments=_add_arguments,
    run=_run,
)
