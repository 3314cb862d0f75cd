"""The files that travel with the package: the nano base, its judge, encoders and prompts, and the recipes.

Nano's are ordinary folders below `diverse_cfg/assets/nano`, so that plain `transformers` loads the base from
the path that `nano_path()` returns, without importing this package.
"""

import difflib
import os
from pathlib import Path
from typing import Any

NANO_PARTS = ("base", "judge", "reward-encoder", "within-encoder", "eval-encoder", "prompts", "open-prompts")

_NANO = Path(__file__).parent / "assets" / "nano"
# A wheel holds a copy of the clone's folder (pyproject.toml).
_RECIPES = Path(__file__).parent / "assets" / "recipes"
if not _RECIPES.is_dir():
    _RECIPES = Path(__file__).parent.parent / "recipes"
_STAGES = (
    "finetune",
    "quality",
    "diversity",
    "merge",
    "evaluate",
)  # a recipe's name begins with the command's work
_TRLS_NAMES = {"multi_gpu": "ddp", "fsdp2": "fsdp", "zero2": "deepspeed_zero2"}
# What a part cannot do without; the others are checked by whoever loads them.
_REQUIRED = {"base": ("config.json", "generation_config.json", "model.safetensors")}


def nano_path(part: str | None = None) -> Path:
    """Folder of one part of the shipped nano world.

    Args:
        part: None or "base" for the MusicGen checkpoint; "judge" (audible attributes), "reward-encoder" and
            "eval-encoder" (two different embedders), "within-encoder" (a reward that ignores what a prompt
            fixes), "prompts" (which name all four attributes), or "open-prompts" (one to four, see `level`).

    Returns:
        An existing folder, usable wherever a model folder or an embedder name is expected.

    Raises:
        ValueError: no part has this name.
        FileNotFoundError: the installation lacks the part or a file of it.
    """
    part = part or "base"
    if part not in NANO_PARTS:
        raise ValueError(f"nano has no part {part!r}; choose one of {', '.join(NANO_PARTS)}")
    folder = _NANO / part
    wanted = _REQUIRED.get(part, ())
    missing = [str(folder / name) for name in wanted if not (folder / name).is_file()]
    if not folder.is_dir() or not any(folder.iterdir()):
        missing = [str(folder)]
    if missing:
        raise FileNotFoundError(
            f"this installation of diverse-cfg lacks the nano {part}: {', '.join(missing)} not found; "
            "reinstall the package, or rebuild it with recipes/nano"
        )
    return folder


def source(name: str, part: str = "base") -> str:
    """What a setting names: `nano` stands for this part of the shipped world, anything else for itself.

    Where prompts are wanted, `nano-open` stands for those that leave attributes open, and `recipes/prompts`, outside
    of a clone, for the installed copy.
    """
    if part == "prompts" and name == "recipes/prompts" and not Path(name).exists():
        return str(_RECIPES / "prompts")
    if part == "prompts" and name == "nano-open":
        part, name = "open-prompts", "nano"
    return str(nano_path(part)) if name == "nano" else name


def shipped(name: Any, part: str = "base") -> Any:
    """What a name means in Python: as `source`, but a file or folder of that name comes first."""
    return source(name, part) if isinstance(name, str) and not os.path.exists(name) else name


def shipped_embedder(name: str) -> str:
    """An encoder as `load_embedder` takes it; `reward-encoder`, `within-encoder` and `eval-encoder` are nano's."""
    ours = name.endswith("-encoder") and name in NANO_PARTS and not os.path.exists(name)
    return str(nano_path(name)) if ours else name


def portable(name: str) -> str:
    """The inverse of `source` for the base: what a file of results calls it, on whatever machine it is read."""
    return "nano" if Path(name) == _NANO / "base" else name


def recipes(folder: str | None = None) -> dict[str, Path]:
    """The installed recipes by name (`musicgen-small/quality`), or those of one folder (`accelerate`) by theirs."""
    if folder is not None:
        return {path.stem: path for path in sorted((_RECIPES / folder).glob("*.yaml"))}
    return {
        f"{path.parent.name}/{path.stem}": path
        for path in sorted(_RECIPES.glob("*/*.yaml"))
        if path.stem.split("-")[0] in _STAGES
    }


def recipe_path(name: str) -> str:
    """The file of a recipe: a path that exists, or the name of an installed one, also as `recipes/NAME.yaml`.

    Raises:
        ValueError: neither.
    """
    return _named(name, "recipe", recipes(), name.removeprefix("recipes/").removesuffix(".yaml"))


def accelerate_config(name: str) -> str:
    """The file of a launch configuration: a path that exists, or a name of `recipes/accelerate`, or TRL's for it.

    Raises:
        ValueError: neither.
    """
    return _named(name, "accelerate_config", recipes("accelerate"), _TRLS_NAMES.get(name, name))


def _named(given: str, kind: str, known: dict[str, Path], name: str) -> str:
    if Path(given).exists():
        return given
    if name in known:
        return str(known[name])
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"installed are {', '.join(known)}"
    raise ValueError(f"{kind} {given} is neither a file nor an installed one; {remedy}")
