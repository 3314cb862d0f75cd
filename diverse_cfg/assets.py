"""The files that travel with the package: the nano base, its judge and encoders, and its prompts.

They are ordinary folders below `diverse_cfg/assets/nano`, so that plain `transformers` loads the base from
the path that `nano_path()` returns, without importing this package.
"""

from pathlib import Path

NANO_PARTS = ("base", "judge", "reward-encoder", "within-encoder", "eval-encoder", "prompts", "open-prompts")

_NANO = Path(__file__).parent / "assets" / "nano"
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

    Where prompts are wanted, `nano-open` stands for those that leave attributes open.
    """
    if part == "prompts" and name == "nano-open":
        part, name = "open-prompts", "nano"
    return str(nano_path(part)) if name == "nano" else name


def portable(name: str) -> str:
    """The inverse of `source` for the base: what a file of results calls it, on whatever machine it is read."""
    return "nano" if Path(name) == _NANO / "base" else name
