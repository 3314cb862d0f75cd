"""Many systems, one protocol: generate, compute features, reduce to numbers; keep what succeeds, record
what fails.

Everything expensive is in the cache before a number is made of it, so that an interrupted sweep goes on
where it stopped, and one that gets another system or metric computes only that. The clips that were measured can be
had again: `kept_codes`, and `write_audio` for pages and listening tests.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from diverse_cfg.acoustics import normalised, piano_roll
from diverse_cfg.atomic import UnwritableError, replacing
from diverse_cfg.evaluation.cache import Cache, digest
from diverse_cfg.evaluation.features import Batch, Feature, compute_features
from diverse_cfg.evaluation.generations import ClipSet, Player, describe, generations
from diverse_cfg.evaluation.metrics import METRICS, Metric, Replicate, require
from diverse_cfg.evaluation.results import Results, SystemResult, clusters_of, estimate, mean_estimate
from diverse_cfg.evaluation.systems import Mixture, System
from diverse_cfg.plotting import png
from diverse_cfg.policies.files import write_wav
from diverse_cfg.provenance import library_versions
from diverse_cfg.untrusted import plain, slug

logger = logging.getLogger(__name__)

_MAX_DIVERGENCE = 10.0  # times the base's KL to the teacher
_MIN_ADHERENCE = 0.75  # of the base's


@dataclass
class Sweep:
    """An evaluation protocol; `run` applies it to systems.

    Args:
        clips: prompts, generations per prompt, length and seeds.
        features: what is computed from clips; decides which metrics there can be.
        cache: where generations and features are kept.
        metrics: names; None for every metric whose ingredients are there.
        reference: embeddings of reference audio under the held-out encoder [C, D], or None.
        min_validity: share of valid clips below which a system is flagged: it stays in the table and leaves
            the front.
        device: torch device.
        settings: further facts for the results file.

    Raises:
        ValueError: metrics that do not exist or cannot be computed; raised before anything is generated.
    """

    clips: ClipSet
    features: Sequence[Feature]
    cache: Cache
    metrics: Sequence[str] | None = None
    reference: np.ndarray | None = None
    min_validity: float = 0.9
    device: str = "cpu"
    settings: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        available = {"codes", "timing", *(feature.name for feature in self.features)}
        available |= {"reference"} if self.reference is not None else set()
        self.chosen: list[Metric] = require(
            self.metrics, available, self.clips.num_generations, len(self.clips.prompts)
        )
        needed = {need for metric in self.chosen for need in metric.needs}
        # Validity is always looked at: a broken system must not pass for a diverse one.
        self.features = [f for f in self.features if f.name in needed or f.name == "validity"]

    def run(
        self, systems: Sequence[System], compare_to: Sequence[str] = (), *, progress: bool = True
    ) -> Results:
        """Evaluate systems; a failure is recorded in its row and the others go on.

        Args:
            systems: with unique names.
            compare_to: names of systems that all others are compared with.
            progress: show a progress bar.
        """
        parts = sum(len(system.replicates) for system in systems)
        total = 2 * parts * self.clips.num_clips  # sampling and judging each see every clip
        rows = []
        with tqdm(total=total, unit="clip", disable=not progress, desc="evaluate") as bar:
            for system in systems:
                bar.set_description(f"evaluate {system.name}")
                before = bar.n
                try:
                    rows.append(self.evaluate(system, bar))
                except UnwritableError:
                    raise  # which would cost the others as well
                # A missing folder, NaN weights or no memory must not cost the others.
                except Exception as error:
                    logger.warning("system %s failed: %s", system.name, error)
                    logger.debug("its traceback", exc_info=True)
                    rows.append(SystemResult(system, error=plain(f"{type(error).__name__}: {error}")))
                bar.update(before + 2 * len(system.replicates) * self.clips.num_clips - bar.n)
        _flag_incomparable(rows)
        return Results(list(self.clips.prompts), rows, self._settings(rows), list(compare_to))

    def evaluate(self, system: System, bar: tqdm | None = None) -> SystemResult:
        """One system, failures raised."""
        replicates = [self._replicate(system, mixture, bar) for mixture in system.replicates]
        row = SystemResult(system)
        for metric in self.chosen:
            number, cells = estimate(metric, replicates)
            row.metrics[metric.name] = number
            if metric.of_set is not None and number.estimate is None:
                row.flags.append(f"{metric.name} could not be computed: too few clips have an embedding")
            if cells is not None:
                row.cells[metric.name] = cells
            clusters = clusters_of(metric, replicates)
            if clusters is not None:
                row.clusters[metric.name] = clusters
        row.flags += self._flags(replicates)
        return row

    def _replicate(self, system: System, mixture: Mixture, bar: tqdm | None) -> Replicate:
        player = Player(mixture, self.device, system.student_guidance, system.first)
        update = None if bar is None else bar.update
        prompts = [prompt for prompt in self.clips.prompts for _ in range(self.clips.num_generations)]
        by_seed = []
        for seed in self.clips.seeds:
            timing = generations(system, player, self.clips, seed, self.cache, update)
            codes = timing.pop("codes")
            clips = Batch(system, player, prompts, torch.from_numpy(codes.astype(np.int64)))
            description = describe(system, mixture, self.clips, seed)
            features = compute_features(clips, description, self.features, self.cache, update)
            by_seed.append({"codes": {"codes": codes}, "timing": timing, **features})
        shape = (len(self.clips.prompts), self.clips.num_generations)
        features = {
            name: {
                column: np.stack(
                    [one[name][column].reshape(*shape, *rows.shape[1:]) for one in by_seed], axis=1
                )
                for column, rows in columns.items()
            }
            for name, columns in by_seed[0].items()
        }
        return Replicate(features, features["codes"]["codes"], self.reference)

    def _flags(self, replicates: list[Replicate]) -> list[str]:
        flags = []
        names = {feature.name for feature in self.features}
        if "validity" in names:
            valid = float(np.mean([replicate.clips("validity", "valid") for replicate in replicates]))
            if valid < self.min_validity:
                flags.append(
                    f"only {valid:.1%} of the clips are valid audio (at least {self.min_validity:.1%} are "
                    "wanted): its diversity is not comparable, and it is left out of fronts"
                )
        for encoder in sorted(names & {"reward", "heldout"}):
            values = np.concatenate([replicate.features[encoder]["values"] for replicate in replicates])
            missing = int(np.isnan(values).any(axis=-1).sum())
            if missing:
                flags.append(
                    f"{missing} clips have no {encoder} embedding (silent?) and count as equal to all others"
                )
        return flags

    def _settings(self, rows: Sequence[SystemResult]) -> dict:
        clips = self.clips
        described = {
            row.system.name: [
                describe(row.system, mixture, clips, seed)
                for mixture in row.system.replicates
                for seed in clips.seeds
            ]
            for row in rows
            if row.ok
        }
        # Kept clips may have been sampled, and timed, on another machine.
        facts = [
            self.cache.facts("generations", one) for of_system in described.values() for one in of_system
        ]
        return {
            "num_prompts": len(clips.prompts),
            "num_generations": clips.num_generations,
            "num_frames": clips.num_frames,
            "seeds": list(clips.seeds),
            "rollout_backend": clips.rollout_backend,
            "features": {feature.name: dict(feature.fingerprint) for feature in self.features},
            "min_validity": self.min_validity,
            "versions": library_versions(),
            "machine": f"{platform.machine()}, {self.device}, {torch.get_num_threads()} threads",
            "timed_on": sorted({fact.get("machine", "a machine that was not recorded") for fact in facts}),
            "clips": {name: [digest(one) for one in of_system] for name, of_system in described.items()},
            **self.settings,
        }


def _flag_incomparable(rows: Sequence[SystemResult]) -> None:
    """Flag systems that are clearly further from music than the unguided base: nothing is as diverse as random codes.

    The base (role "base", γ = 1, T = 1) is the worst that a sweep has any use for: students and guidance improve on
    it. A system is flagged if the 95 % interval of what it has above 10 times the base's KL to the teacher, or below
    75 % of the base's adherence (judged, by rules or by text, whatever was measured), excludes 0. Multiples of the
    nano base's KL (47 nats per clip): 1.3 at T = 1.1, 1.9 at γ = 7, below 1 for all students; of its adherence: 0.96
    or more for all of these. In a small sweep γ = 10 and T = 1.5 had 6 times its KL, T = 2 had 16 times; T = 5, next
    to random codes, 58 times and 0.37 of its adherence.
    Without such a base, or a metric, or with one prompt nothing is flagged; nor by a KL to a teacher that is within 1
    nat per clip of the base itself, where 10 times as much may still be nothing.

    Args:
        rows: of one sweep; their flags are extended.
    """
    sound = [row for row in rows if row.ok and not row.flags and row.system.role == "base"]
    bases = [row for row in sound if row.system.guidance_scale == row.system.temperature == 1]
    if not bases:
        return
    base = bases[0]
    checks = [("kl_teacher", 1, _MAX_DIVERGENCE, 1.0)]
    checks += [(name, -1, _MIN_ADHERENCE, 0.0) for name in ("adherence", "rules", "text")]
    for row in rows:
        for metric, sign, factor, smallest in checks:
            if row is base or not (metric in row.cells and metric in base.cells):
                continue
            reference = base.cells[metric].mean(axis=1, keepdims=True)
            excess = mean_estimate(sign * (row.cells[metric] - factor * reference))
            if np.nanmean(reference) > smallest and excess.low is not None and excess.low > 0:
                row.flags.append(
                    f"its {METRICS[metric].label} is {row.metrics[metric].text()}, against "
                    f"{base.metrics[metric].text()} of {base.system.name}: its diversity is not comparable, and it is "
                    "left out of fronts"
                )


# ---- the clips again -----------------------------------------------------------------------------


def kept_codes(system: System, sweep: Sweep) -> np.ndarray:
    """Codes [P·G, K, T] that the evaluation kept of a system: its first replicate under the first sampling seed.

    Raises:
        ValueError: they are not in the cache.
    """
    description = describe(system, system.replicates[0], sweep.clips, sweep.clips.seeds[0])
    kept = sweep.cache.load("generations", description)
    if kept is None:
        raise ValueError(
            f"the clips of system {system.name!r} are not in {sweep.cache.folder}: the cache was deleted, or "
            "the model was written over; run `diverse-cfg evaluate` with this configuration again"
        )
    return kept["codes"]


def write_audio(
    results: Results, sweep: Sweep, folder: str | os.PathLike, num_prompts: int, num_generations: int
) -> dict[tuple[str, int], list[str]]:
    """Write the first clips of the first prompts of every system as WAV files of one loudness.

    Beside each lies its picture (`piano_roll`). Nothing is generated: the clips are those that were measured. Files
    that are there already are kept: they are named after the content of their clips.

    Args:
        results: of the sweep; failed systems have no clips.
        sweep: that made them; its cache holds the codes.
        folder: of the page; the files go to `audio/` below it.
        num_prompts: how many prompts.
        num_generations: how many clips of each.

    Returns:
        (system, prompt index) → paths relative to `folder`.

    Raises:
        ValueError: clips that are not in the cache.
    """
    folder = Path(folder)
    num_prompts = min(num_prompts, len(sweep.clips.prompts))
    num_generations = min(num_generations, sweep.clips.num_generations)
    files: dict[tuple[str, int], list[str]] = {}
    for index, row in enumerate(results.systems):
        if not row.ok:
            continue
        codes = kept_codes(row.system, sweep)
        player = Player(row.system.replicates[0], sweep.device)
        place = Path("audio") / f"{index:02d}-{slug(row.system.name, default='system')}"
        (folder / place).mkdir(parents=True, exist_ok=True)
        for prompt in range(num_prompts):
            first = prompt * sweep.clips.num_generations
            files[row.system.name, prompt] = _write_clips(
                folder, place, prompt, codes[first : first + num_generations], player
            )
    return files


def _write_clips(folder: Path, place: Path, prompt: int, codes: np.ndarray, player: Player) -> list[str]:
    names = [
        f"{prompt:02d}-{number}-{hashlib.blake2b(clip.tobytes(), digest_size=4).hexdigest()}.wav"
        for number, clip in enumerate(codes)
    ]
    missing = [
        number
        for number, name in enumerate(names)
        if not all((folder / place / name).with_suffix(kind).is_file() for kind in (".png", ".wav"))
    ]
    if missing:
        audio = player.decode(torch.from_numpy(codes[missing].astype("int64")))
        for number, waveform in zip(missing, audio, strict=True):
            path = folder / place / names[number]
            with replacing(path.with_suffix(".png")) as temporary:
                temporary.write_bytes(png(piano_roll(waveform.numpy(), player.sampling_rate)))
            loud = torch.from_numpy(normalised(waveform.numpy(), player.sampling_rate))
            write_wav(path, loud, player.sampling_rate)
    return [(place / name).as_posix() for name in names]
