"""What is compared: a system is a model (or a merge of models) together with the way it is sampled.

A system may have several replicates, one per training seed; their clips are pooled as crossed with the
prompts. `expand_systems` turns the entries of a sweep's YAML into systems: lists of guidance scales,
temperatures or merge weights are grids, and `nano` is the shipped base.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from diverse_cfg.assets import portable, source
from diverse_cfg.functional.guidance import adaptive_guidance, guidance_schedule
from diverse_cfg.merging.weights import parse_sweep, resolve_weights
from diverse_cfg.policies.loading import is_distilled
from diverse_cfg.policies.sampler.draws import SamplingSettings
from diverse_cfg.settings import require_settings
from diverse_cfg.untrusted import plain

ROLES = ("base", "guided", "student", "merge")

_SEED_FOLDER = re.compile(r"(?:^|[/\\\\])seed-(\d+)(?=$|[/\\\\])")

Mixture = tuple[tuple[str, float], ...]
"""Checkpoints with their weights; one checkpoint of weight 1 is a plain model."""

_ENTRY_TYPES: dict[str, Any] = {
    "name": str,
    "model": str | list[str],
    "checkpoints": list[str | list[str]],
    "merge_weight": str | float | list[float],
    "weights": list[float] | None,
    "guidance_scale": float | list[float],
    "guidance_schedule": str | list[str],
    "student_guidance": float | list[float],
    "temperature": float | list[float],
    "top_k": int | list[int],
    "first": str,
    "first_frames": int | list[int],
    "first_guidance_scale": float | list[float],
    "role": str | None,
    "series": str | None,
    "step": int | None,
}
_GRID_KEYS = {
    "guidance_scale": "γ",
    "guidance_schedule": "γ(t)",
    "student_guidance": "student γ",
    "temperature": "T",
    "top_k": "k",
    "first_frames": "n",
    "first_guidance_scale": "γ first",
}


@dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
        name: unique in a sweep.
        replicates: one model per training seed; clips are generated for each of them. Folders named `seed-N`
            tell which seed, so that comparisons can be made seed by seed.
        guidance_scale: γ at inference; 1 is no guidance.
        guidance_schedule: γ over the frames; see `guidance_schedule` and `adaptive_guidance` in `functional.guidance`.
        student_guidance: γ that a student of a range is told; None is what it plays untold.
        temperature: 0 is greedy.
        top_k: 0 keeps all codes.
        first: a model that begins, before that of the replicate goes on; empty for none. See `hybrid_generate`.
        first_frames: how much it plays.
        first_guidance_scale: its γ.
        role: "base", "guided", "student" or "merge"; decides how it is drawn.
        series: systems of one series are joined by a line in the plots.
        merge_weight: λ of a merge of two, its place on the LERP's axis.
        step: training step of a checkpoint, its place on a trajectory.
    """

    name: str
    replicates: tuple[Mixture, ...]
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    temperature: float = 1.0
    top_k: int = 0
    first: str = ""
    first_frames: int = 0
    first_guidance_scale: float = 1.0
    role: str = "student"
    series: str = ""
    merge_weight: float | None = None
    step: int | None = None
    student_guidance: float | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("a system needs a name")
        for text in (self.name, self.series):
            if text and ("\n" in text or plain(text) != text):
                raise ValueError(
                    f"system {text!r}: a name is one line of letters, without control characters"
                )
        if not self.replicates or not all(self.replicates):
            raise ValueError(f"system {self.name!r} has no model")
        if self.role not in ROLES:
            raise ValueError(f"system {self.name!r}: role={self.role!r} must be one of {', '.join(ROLES)}")
        if bool(self.first) != (self.first_frames > 0) or (not self.first and self.first_guidance_scale != 1):
            raise ValueError(
                f"system {self.name!r}: a model that begins has a name, first, and first_frames of at least 1"
            )
        try:
            _ = self.sampling, self.first_sampling
            _ = self.sampling_of(2)
        except ValueError as error:
            raise ValueError(f"system {self.name!r}: {error}") from None

    @property
    def sampling(self) -> SamplingSettings:
        """How its codes are drawn."""
        return SamplingSettings(self.guidance_scale, self.temperature, self.top_k)

    @property
    def first_sampling(self) -> SamplingSettings:
        """How the codes of the model that begins are drawn."""
        return replace(self.sampling, guidance_scale=self.first_guidance_scale)

    def sampling_of(self, num_frames: int) -> SamplingSettings:
        """The same for clips of T frames, each with its γ."""
        if self.guidance_schedule == "constant":
            return self.sampling
        if adaptive := adaptive_guidance(self.guidance_schedule):
            return replace(self.sampling, adaptive_guidance=adaptive if self.sampling.guided else None)
        schedule = guidance_schedule(self.guidance_schedule, self.guidance_scale, num_frames)
        return replace(self.sampling, guidance_scale=schedule)

    @property
    def untrained(self) -> bool:
        """Whether no training seed is behind it: the base, however it is sampled. It is the same for all seeds."""
        return self.role in ("base", "guided") and len(self.replicates) == 1 and not self.training_seeds

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """Training seed of each replicate, read from a folder `seed-N` on the way to its checkpoints and `first`.

        Empty where a replicate has no such folder, or several (a merge of seeds), or two replicates the same.
        """
        found = [
            {int(seed) for name in (self.first, *dict(mixture)) for seed in _SEED_FOLDER.findall(name)}
            for mixture in self.replicates
        ]
        seeds = tuple(min(seeds) for seeds in found if len(seeds) == 1)
        return seeds if len(set(seeds)) == len(self.replicates) else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the results file; the shipped base is `nano`, wherever it is installed."""
        values = asdict(self) | {"first": portable(self.first)}
        values["replicates"] = [
            [[portable(checkpoint), weight] for checkpoint, weight in mixture] for mixture in self.replicates
        ]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "System":
        """The inverse of `to_dict`."""
        replicates = tuple(
            tuple((source(str(checkpoint)), float(weight)) for checkpoint, weight in mixture)
            for mixture in values["replicates"]
        )
        return cls(**{**values, "replicates": replicates, "first": source(values.get("first", ""))})


def single(model: str | os.PathLike) -> tuple[Mixture, ...]:
    """Replicates of a system that is one model."""
    return (((os.fspath(model), 1.0),),)


def shared_replicates(systems: Sequence[System]) -> list[list[int]] | None:
    """Which replicates of each system belong together.

    Returns:
        Columns of the cells, for each system a list of one length R: the replicates of the training seeds
        that all systems share; a system that was not trained repeats its only one. None if they cannot be
        paired.
    """
    trained = [system for system in systems if not system.untrained]
    if not trained:
        return [[0]] * len(systems)
    labels = {id(system): system.training_seeds for system in trained}
    if not all(labels.values()):  # seeds without names: by their order, if they are as many
        labels = {id(system): tuple(range(len(system.replicates))) for system in trained}
        if len(set(labels.values())) > 1:
            return None
    shared = sorted(set.intersection(*(set(seeds) for seeds in labels.values())))
    if not shared:
        return None
    return [
        [0] * len(shared) if system.untrained else [labels[id(system)].index(seed) for seed in shared]
        for system in systems
    ]


def expand_systems(entries: Sequence[Mapping[str, Any]]) -> list[System]:
    """Systems of a sweep from its YAML entries.

    An entry has a `name` and either `model` or `checkpoints` with `merge_weight` (two checkpoints: a
    number, a list, or "0:1:0.05") or `weights` (one per checkpoint; the uniform average when both are left
    out). A list of models, or of lists of checkpoints' models, holds the training seeds of one arm. Lists
    of `guidance_scale`, `temperature`, `top_k` and `merge_weight` are grids; their systems form a series
    with the entry's name. `first` names a model that begins, with `first_frames` and `first_guidance_scale`, of
    which both may be grids too.

    Raises:
        ValueError: unknown or missing keys, names that are not unique, numbers out of range.
    """
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence) or not entries:
        raise ValueError("systems must be a non-empty list of entries, each with a name and a model")
    systems = [system for entry in entries for system in _expand(entry)]
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"system names must be unique; twice: {', '.join(twice)}")
    return systems


def _expand(entry: Mapping[str, Any]) -> list[System]:
    if not isinstance(entry, Mapping) or not str(entry.get("name") or "").strip():
        raise ValueError(f"every system needs a name, got {entry!r}")
    name = entry["name"]
    require_settings(entry, _ENTRY_TYPES, f"system {name!r}", prefix=f"system {name!r}: ")
    for key, value in entry.items():
        if value in ([], ()):
            raise ValueError(f"system {name!r}: {key}={value!r} is empty: name at least one, or leave it out")
    if ("model" in entry) == ("checkpoints" in entry):
        raise ValueError(f"system {name!r} needs either a model or checkpoints to merge")
    grid = {key: _listed(entry[key]) for key in _GRID_KEYS if key in entry}
    if 0 in grid.get("temperature", ()) and any(grid.get("top_k", ())):
        raise ValueError(
            f"system {name!r}: top_k has no effect at temperature 0, which takes the most likely codes; write an "
            "entry of its own for one of the two"
        )
    scheduled = [name for name in grid.get("guidance_schedule", ()) if name != "constant"]
    if scheduled and 1 in grid.get("guidance_scale", (1,)):
        raise ValueError(
            f"system {name!r}: guidance_schedule={scheduled[0]} has no effect at guidance_scale 1, its default: name "
            "another, or write an entry of its own for 1"
        )
    varied = [key for key, values in grid.items() if len(values) > 1]
    series = entry.get("series") or name
    first = source(entry["first"]) if "first" in entry else ""
    systems = []
    for suffix, weight, replicates in _models(name, entry):
        for point in itertools.product(*grid.values()):
            sampling = dict(zip(grid, point, strict=True))
            marks = [suffix, *(f"{_GRID_KEYS[key]}={_short(sampling[key])}" for key in varied)]
            systems.append(
                System(
                    name=" ".join([name, *filter(None, marks)]),
                    replicates=replicates,
                    role=entry.get("role") or _role(replicates, first, sampling),
                    series=series,
                    first=first,
                    merge_weight=weight,
                    step=entry.get("step"),
                    **sampling,
                )
            )
    return systems


def _models(name: str, entry: Mapping[str, Any]) -> list[tuple[str, float | None, tuple[Mixture, ...]]]:
    """(suffix of the name, λ, replicates) of every model that an entry names."""
    if "model" in entry:
        wrong = [key for key in ("merge_weight", "weights") if key in entry]
        if wrong:
            raise ValueError(f"system {name!r}: {wrong[0]} needs checkpoints to merge, not a model")
        models = _listed(entry["model"])
        return [("", None, tuple(((source(model), 1.0),) for model in models))]
    seeds = _seeds(name, entry["checkpoints"])
    if "merge_weight" in entry and entry.get("weights") is not None:
        raise ValueError(f"system {name!r}: merge_weight and weights both say how to merge; keep one")
    if "merge_weight" in entry:
        weights = entry["merge_weight"]
        points = parse_sweep(weights) if isinstance(weights, str) else [float(w) for w in _listed(weights)]
        several = len(points) > 1
        return [(f"λ={point:g}" if several else "", point, _mixtures(name, seeds, point)) for point in points]
    return [("", None, _mixtures(name, seeds, entry.get("weights")))]


def _seeds(name: str, checkpoints: Any) -> list[tuple[str, ...]]:
    """Checkpoints of every training seed; a single one (the base) serves all seeds."""
    if not isinstance(checkpoints, list) or not checkpoints:
        raise ValueError(f"system {name!r}: checkpoints must be a list, got {checkpoints!r}")
    columns = [_listed(checkpoint) for checkpoint in checkpoints]
    count = max(len(column) for column in columns)
    wrong = [column for column in columns if len(column) not in (1, count)]
    if wrong:
        raise ValueError(
            f"system {name!r}: {len(wrong[0])} training seeds of one checkpoint and {count} of another"
        )
    columns = [column if len(column) == count else column * count for column in columns]
    return [tuple(source(part) for part in row) for row in zip(*columns, strict=True)]


def _mixtures(name: str, seeds: list[tuple[str, ...]], weights: Any) -> tuple[Mixture, ...]:
    try:
        resolved = resolve_weights(weights, len(seeds[0]))
    except ValueError as error:
        raise ValueError(f"system {name!r}: {error}") from None
    return tuple(tuple(zip(seed, resolved, strict=True)) for seed in seeds)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _role(replicates: tuple[Mixture, ...], first: str, sampling: Mapping[str, Any]) -> str:
    """What decides how it is drawn: of a hybrid a student's part, else guidance."""
    checkpoints = [checkpoint for checkpoint, _ in replicates[0]]
    if len(checkpoints) > 1:
        return "merge"
    guided = sampling.get("guidance_scale", 1.0) > 1
    if first and (is_distilled(first) or is_distilled(checkpoints[0])):
        return "student"
    if guided or sampling.get("first_guidance_scale", 1.0) > 1:
        return "guided"
    return "student" if is_distilled(checkpoints[0]) else "base"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
