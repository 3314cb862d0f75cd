"""What a model folder is, written beside its weights: `diverse_cfg.json`.

A folder of weights cannot say that guidance is already inside it, how strongly its diversity was rewarded,
or that it is a merge of two others. Whoever writes a model folder writes this file too; `inspect`, `merge`,
the card and the loader read it. It holds facts only, never a token or a path that the writer did not put
there.
"""

import json
import math
import os
import platform
import warnings
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diverse_cfg import __version__
from diverse_cfg.atomic import write_text
from diverse_cfg.reading import read_json, reading

PROVENANCE_FILE = "diverse_cfg.json"
KINDS = ("student", "merge")
_REMEDY = "delete it or restore it from a backup"
# Libraries whose version changes what the weights mean or how they were trained.
_LIBRARIES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True)
class Provenance:
    """The content of `diverse_cfg.json`.

    Args:
        kind: "student" (trained by this package) or "merge" (interpolated from other checkpoints).
        base_model: Hub id or folder of θ0, the checkpoint that everything started from.
        guidance_scale: γ of the teacher, i.e. the guidance that is *inside* the weights (generate with 1.0).
        guidance_range: lowest and highest γ that the model can be told; it then plays `guidance_scale` where it is
            told none. None for a model of one γ.
        diversity_coef: β, the weight of the diversity reward; None for a merge.
        merge: the recipe of a merge (method, dtype, experts with their weights), None for a student.
        sampling: how the model was trained and is evaluated: temperature, top_k, num_frames…
        training: what else the card tells: steps, learning rate, num_generations, clip seconds…
        versions: versions of the libraries that wrote the folder.
        distilled: whether a teacher's guidance is in the weights; False for a merge of models that none distilled.
    """

    kind: str
    base_model: str | None = None
    guidance_scale: float | None = None
    diversity_coef: float | None = None
    merge: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    guidance_range: list[float] | None = None
    distilled: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"provenance kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not isinstance(self.base_model, str | None):
            raise ValueError(f"provenance base_model must be an id or a folder, got {self.base_model!r}")
        for name in ("sampling", "training", "versions"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"provenance {name} must hold values by name, got {value!r}")
        numbers = {name: getattr(self, name) for name in ("guidance_scale", "diversity_coef")}
        numbers |= {
            name: self.sampling.get(name) for name in ("num_frames", "temperature", "top_k", "top_p", "min_p")
        }
        numbers["clip_seconds"] = self.training.get("clip_seconds")
        for name, value in numbers.items():
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"provenance {name} must be a finite number or None, got {value!r}")
        ends = self.guidance_range
        if ends is not None and not (
            isinstance(ends, list) and len(ends) == 2 and all(isinstance(x, int | float) for x in ends)
        ):
            raise ValueError(f"provenance guidance_range must be two numbers or None, got {ends!r}")
        if not isinstance(self.distilled, bool):
            raise ValueError(f"provenance distilled must be true or false, got {self.distilled!r}")
        if self.merge is not None and not all(
            {"name", "weight"} <= {*e} for e in self.merge.get("experts", [])
        ):
            raise ValueError("provenance merge must give every expert a name and a weight")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a checkpoint means, for `Provenance.versions`."""
    versions = {"diverse-cfg": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def read_provenance(folder: str | os.PathLike) -> Provenance | None:
    """Read `diverse_cfg.json` of a model folder.

    Returns:
        None when the folder has none, i.e. when another program wrote it. Keys that this version does not
        know are ignored, so that newer folders stay readable.

    Raises:
        ValueError: the file is not valid.
    """
    path = Path(folder) / PROVENANCE_FILE
    if not path.exists():
        return None
    content = read_json(path, _REMEDY)
    if "kind" not in content:
        raise ValueError(f"{path} does not describe a model: it lacks the key 'kind'; {_REMEDY}")
    known = {f.name for f in fields(Provenance)}
    with reading(path, _REMEDY):
        return Provenance(**{key: value for key, value in content.items() if key in known})


def write_provenance(folder: str | os.PathLike, provenance: Provenance) -> Path:
    """Write `diverse_cfg.json` into a model folder, adding the library versions; return its path."""
    content = asdict(provenance)
    content["versions"] = {**library_versions(), **provenance.versions}
    if provenance.guidance_range is None:
        del content["guidance_range"]  # most models are of one γ
    if provenance.distilled:
        del content["distilled"]
    return write_text(
        Path(folder) / PROVENANCE_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    )


def warn_if_guided(guidance_scale: float | None, stacklevel: int = 2) -> None:
    """Warn when a distilled checkpoint is about to be generated with guidance on top.

    The teacher's guidance is inside its weights: guiding once more doubles the cost and overshoots.
    """
    if guidance_scale is None or guidance_scale <= 1:
        return
    warnings.warn(
        "the model was distilled from a guided teacher, and is asked to generate with "
        f"guidance_scale={guidance_scale:g}: guidance would be applied twice, at twice the cost. Pass "
        "guidance_scale=1.0.",
        UserWarning,
        stacklevel=stacklevel,
    )
