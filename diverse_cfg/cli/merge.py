"""`diverse-cfg merge`: checkpoints in, one interpolated checkpoint (or a sweep of them) out."""

import argparse
from pathlib import Path
from typing import Any, Literal

from diverse_cfg.assets import recipe_path
from diverse_cfg.cli.command import Command, model_source, refuse_idle


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="*",
        help="folders or Hub ids: full models, LoRA adapters, or `nano` for the shipped base",
    )
    add(
        "--config",
        "--recipe",
        metavar="YAML",
        help="recipe with these settings by name, its file or its name (diverse-cfg recipes); what is typed wins",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--weight",
        "--merge-weight",
        dest="merge_weight",
        type=float,
        metavar="λ",
        help="weight of the second of two: (1 − λ)·first + λ·second",
    )
    how.add_argument(
        "--uniform",
        action="store_true",
        default=None,
        help="the plain average (the default without any weights)",
    )
    how.add_argument("--weights", type=float, nargs="+", metavar="w", help="one weight per checkpoint")
    how.add_argument(
        "--sweep", metavar="START:STOP:STEP", help="several λ at once, e.g. 0:1:0.05, one folder each"
    )
    add("-o", "--output", help="folder to create (a sweep continues in an existing one)")
    add("--base", help="the adapters' base, if it differs from the one that they name")
    add(
        "--dtype",
        help="float32, bfloat16, float16 or float64 (default: the widest in which a checkpoint is stored)",
    )
    add(
        "--format",
        choices=["full", "adapter"],
        help="what to write: a full model, or one adapter (default: full)",
    )
    add(
        "--bake-guidance",
        type=float,
        metavar="γ",
        help="fold one γ into students of a range, for an ordinary model (default: the merge keeps the range)",
    )
    add("--extrapolate", action="store_true", default=None, help="allow weights outside [0, 1]")
    add("--unnormalized", action="store_true", default=None, help="allow weights that do not sum to 1")


_WAYS = ("merge_weight", "uniform", "weights", "sweep")
_TYPES: dict[str, Any] = {
    "checkpoints": list[str],
    "merge_weight": float,
    "uniform": bool,
    "weights": list[float],
    "sweep": str,
    "output": str,
    "base": str,
    "dtype": str,
    "format": Literal["full", "adapter"],
    "bake_guidance": float,
    "extrapolate": bool,
    "unnormalized": bool,
}


def _apply_recipe(args: argparse.Namespace) -> None:
    """Fill in what was not typed from the recipe, in place.

    Raises:
        ValueError: not a mapping, a name that does not exist, a value of another type, or no checkpoints or
            output in the end.
    """
    if args.config:
        from diverse_cfg.settings import read_settings, require_settings

        recipe = read_settings(recipe_path(args.config))
        require_settings(recipe, _TYPES, args.config, prefix=f"{args.config}: ")
        ways = [name for name in _WAYS if recipe.get(name, False) is not False]
        if len(ways) > 1:
            raise ValueError(f"{args.config} names several ways to weigh: {' and '.join(ways)}; keep one")
        way_is_typed = any(getattr(args, name) is not None for name in _WAYS)
        for name, value in recipe.items():
            typed = getattr(args, name) is not None and getattr(args, name) != []
            if not typed and not (way_is_typed and name in _WAYS):
                setattr(args, name, value)
    if not args.checkpoints:
        raise ValueError("no checkpoints: name the folders or ids to merge, or a --config that does")
    if not args.output:
        raise ValueError("no output: name the folder to create with -o, or a --config that does")


def _run(args: argparse.Namespace) -> None:
    _apply_recipe(args)
    print(*merge(args), sep="\n")


def merge(args: argparse.Namespace) -> list[Path]:
    """Write what the options ask for; returns the folders."""
    if args.weights is None:
        refuse_idle(args, "unnormalized", "without --weights, as all other weights sum to 1")
        if args.merge_weight is None and args.sweep is None:
            refuse_idle(args, "extrapolate", "on the plain average")
    if args.merge_weight is not None and len(args.checkpoints) != 2:
        raise ValueError(
            f"--merge-weight needs two checkpoints, got {len(args.checkpoints)}; give --weights, one for each"
        )
    from diverse_cfg.merging import merge_checkpoints, merge_sweep, parse_sweep

    checkpoints = [model_source(checkpoint) for checkpoint in args.checkpoints]
    shared = {
        "base": args.base and model_source(args.base),
        "dtype": args.dtype,
        "extrapolate": bool(args.extrapolate),
        "format": args.format or "full",
        "bake_guidance": args.bake_guidance,
    }
    if args.sweep:
        return merge_sweep(checkpoints, parse_sweep(args.sweep), args.output, **shared)
    weights = args.weights if args.merge_weight is None else args.merge_weight
    shared["unnormalized"] = bool(args.unnormalized)
    return [merge_checkpoints(checkpoints, weights, args.output, **shared)]


COMMAND = Command(
    name="merge",
    summary="interpolate checkpoints into one model, e.g. a quality student and a diversity student",
    add_arguments=add_merge_arguments,
    run=_run,
    resume="nothing half-written is left; a sweep goes on where it stopped when run again",
)
