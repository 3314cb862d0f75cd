"""What is computed from clips once and kept: embeddings, judgements, acoustics, divergence to the teacher.

A feature turns a batch of clips into one row per clip. Each names what it depends on (its `fingerprint`),
which together with the clips' description is the key under which its rows are kept. Metrics are cheap
functions of these rows. `reference_embeddings` are those of a folder of recordings, for the distances to real music.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
from torch import Tensor

from diverse_cfg import acoustics, facets, rewards
from diverse_cfg.embeddings import Embedder, audio
from diverse_cfg.evaluation.cache import Cache, content_digest, digest, file_digest, weights_digest
from diverse_cfg.evaluation.generations import Player, Progress
from diverse_cfg.evaluation.systems import System
from diverse_cfg.functional.guidance import before_agreement, guided_logits, total_variation
from diverse_cfg.nano import attributes, rules
from diverse_cfg.policies.policy import Policy
from diverse_cfg.policies.sampler.draws import SamplingSettings, sampling_logits
from diverse_cfg.policies.sampler.extension import drawn_first
from diverse_cfg.rewards import AestheticsReward, TextAdherenceReward
from diverse_cfg.threads import EVALUATION
from diverse_cfg.types import TextCondition

AESTHETICS_AXES = {"aesthetics_ce": "CE", "aesthetics_pq": "PQ"}
_EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")
_CHUNK = 64  # clips whose audio is in memory at once
_LOGIT_BYTES = 256 * 2**20


@dataclass
class Batch:
    """Clips of one replicate, decoded when a feature asks for audio."""

    system: System
    player: Player
    prompts: list[str]  # one per clip
    codes: Tensor  # [B, K, T]

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.system, self.player, self.prompts[rows], self.codes[rows])

    @property
    def sampling_rate(self) -> int:
        """Of the audio, in Hz."""
        return self.player.sampling_rate

    @cached_property
    def waveforms(self) -> Tensor:
        """[B, L] or [B, 2, L]."""
        return self.player.decode(self.codes)


class Feature(Protocol):
    """One kind of row per clip.

    Attributes:
        name: under which metrics find it.
    """

    name: str

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Everything beside the clips that decides the rows, as plain values."""
        ...

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        """Arrays [B, ...]."""
        ...


class EmbeddingFeature:
    """Embeddings of one encoder, `values` [B, D]; a clip that has none (silence) gets a row of NaN.

    Args:
        name: "reward" or "heldout".
        embedder: the encoder.
        source: its folder or id, for the fingerprint.
    """

    def __init__(self, name: str, embedder: Embedder, source: str):
        self.name = name
        self.embedder = embedder
        self.fingerprint = {
            "feature": "embedding",
            "encoder": embedder.name,
            "content": content_digest(source),
            "reads": embedder.reads,
            "code": code_digest(type(embedder).__module__, audio.__name__),
        }

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        if self.embedder.reads == "codes" and self.embedder.sampling_rate != batch.sampling_rate:
            raise ValueError(
                f"encoder {self.embedder.name!r} reads codes of a {self.embedder.sampling_rate} Hz codec, "
                f"the system's codec has {batch.sampling_rate} Hz: take an encoder that reads waveforms"
            )
        inputs = batch.codes if self.embedder.reads == "codes" else batch.waveforms
        values = self.embed(inputs, batch.sampling_rate)
        return {"values": values}

    def embed(self, inputs: Tensor, sampling_rate: int) -> np.ndarray:
        """Embeddings [B, D] of codes or waveforms; NaN where the encoder has no direction for a clip."""
        with torch.no_grad():
            values = self.embedder.embed(inputs, sampling_rate=sampling_rate).float().cpu()
        if values.ndim != 2 or len(values) != len(inputs):
            raise ValueError(
                f"encoder {self.embedder.name!r} returned shape {tuple(values.shape)} for {len(inputs)} "
                "clips; it must return [B, D]"
            )
        norms = values.norm(dim=1)
        values[~(torch.isfinite(norms) & (norms > 0))] = torch.nan
        return values.numpy()


class JudgeFeature:
    """Adherence by the trained judge: `mean` and one column per attribute, NaN where the prompt names none.

    Args:
        judge: an `AttributeJudge`, or anything with its `adherence`.
        source: its folder.
    """

    name = "judge"

    def __init__(self, judge: Any, source: str):
        self.judge = judge
        self.fingerprint = {
            "feature": "judge",
            "content": content_digest(source),
            "code": code_digest(type(judge).__module__, attributes.__name__, audio.__name__),
        }

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        return _floats(self.judge.adherence(batch.waveforms, batch.sampling_rate, batch.prompts))


class RulesFeature:
    """Adherence by rules without any network: onset rate, pitch, chroma."""

    name = "rules"

    def __init__(self):
        modules = (rules, attributes, audio)
        self.fingerprint = {"feature": "rules", "code": code_digest(*(module.__name__ for module in modules))}

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        return _floats(rules.rule_adherence(batch.waveforms, batch.sampling_rate, batch.prompts))


class ValidityFeature:
    """Level, peak, clipping, silence, and whether a clip is sound at all."""

    name = "validity"

    def __init__(self):
        self.fingerprint = {"feature": "validity", "code": code_digest(acoustics.__name__)}

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        return _floats(acoustics.validity(batch.waveforms, batch.sampling_rate))


class FacetsFeature:
    """What each facet of the music is in a clip, a column each."""

    name = "facets"

    def __init__(self):
        modules = (facets, rules, acoustics, audio)
        self.fingerprint = {
            "feature": "facets",
            "code": code_digest(*(module.__name__ for module in modules)),
        }

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        return _floats(facets.measure(batch.waveforms, batch.sampling_rate))


class _RewardFeature:
    """What a reward function of single clips gives, as the column `score`."""

    score: Any

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        audio = {"sampling_rate": batch.sampling_rate, "waveforms": batch.waveforms}
        return _floats({"score": self.score(prompts=batch.prompts, **audio)})


class TextAdherenceFeature(_RewardFeature):
    """Cosine between a clip and its prompt, `score`. Where it was a reward, it is no judge.

    Args:
        embedder: with `embed` and `embed_text`, such as `ClapEmbedder`.
        source: its folder or id.
    """

    name = "text"

    def __init__(self, embedder: Any, source: str):
        self.score = TextAdherenceReward(embedder)
        self.fingerprint = {
            "feature": "text",
            "encoder": embedder.name,
            "content": content_digest(source),
            "code": code_digest(rewards.__name__, type(embedder).__module__, audio.__name__),
        }


class AestheticsFeature(_RewardFeature):
    """One axis of Audiobox-Aesthetics, `score`, about 1 to 10.

    Args:
        name: one of `AESTHETICS_AXES`.
        model: an `AesMultiOutput`; by default that of the Hub. Both axes may share it.
        device: where it runs.
    """

    def __init__(self, name: str, model: Any = None, device: str | None = None):
        self.name = name
        self.score = AestheticsReward(AESTHETICS_AXES[name], model, device)
        try:
            package = version("audiobox_aesthetics")
        except PackageNotFoundError:
            package = "none"
        self.fingerprint = {
            "feature": name,
            "model": type(self.score.model).__name__,
            "package": package,
            "weights": weights_digest(self.score.model),
            "scale": {key: float(value) for key, value in self.score.scale.items()},
            "code": code_digest(rewards.__name__, audio.__name__),
        }


# What computes a divergence.
_CODE = (
    "diverse_cfg.policies.musicgen.model",
    "diverse_cfg.functional.codebooks",
    "diverse_cfg.functional.guidance",
    "diverse_cfg.policies.sampler.draws",
)


class DivergenceFeature:
    """KL(system ‖ teacher) of the distributions that codes are drawn from, on the system's own clips.

    `kl` is summed over all codes of a clip (nats), as in the paper; `entropy_0` is the mean entropy (nats)
    of the distributions of codebook 0, which falls when a policy becomes colder.

    Args:
        teacher: the frozen base.
        source: its folder or id.
        guidance_scale: γ of the teacher.
    """

    name = "divergence"

    def __init__(self, teacher: Player, source: str, guidance_scale: float):
        self.teacher = teacher
        self.sampling = SamplingSettings(guidance_scale)
        self.fingerprint = {
            "feature": "divergence",
            "teacher": content_digest(source),
            "guidance_scale": float(guidance_scale),
            "code": code_digest(__name__, *_CODE),
        }

    @torch.no_grad()
    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        student, teacher = batch.player.policy, self.teacher.policy
        self._check(student, teacher)
        device = student.device
        num_frames = batch.codes.shape[-1]
        sampling = batch.system.sampling_of(num_frames)
        first = None if batch.player.first is None else batch.player.first.policy
        by_first = drawn_first(num_frames, batch.system.first_frames, student.delays)[..., None].to(device)
        of_student, of_teacher = (policy.encode_text(batch.prompts) for policy in (student, teacher))
        at_once = max(1, _LOGIT_BYTES // (8 * 4 * student.vocab_size * batch.codes[0].numel()))
        kl, entropy = [], []
        for rows in torch.arange(len(batch.codes)).split(at_once):
            codes, select = batch.codes[rows].to(device), rows.to(device)
            p = _distribution(student, codes, of_student.select(select), sampling)
            if first is not None:
                text = first.encode_text([batch.prompts[row] for row in rows])
                begun = _distribution(first, codes, text, batch.system.first_sampling)
                p = torch.where(by_first, begun, p)
            q = _distribution(teacher, codes, of_teacher.select(select), self.sampling)
            weight = p.exp()
            # 0·log 0 = 0: a filter's −inf belongs to a probability of 0.
            per_code = torch.where(weight > 0, weight * (p - q), 0).sum(dim=-1)
            kl.append(per_code.double().sum(dim=(1, 2)))
            of_first = torch.where(weight[:, 0] > 0, -weight[:, 0] * p[:, 0], 0).sum(dim=-1)
            entropy.append(of_first.double().mean(dim=-1))
        return {"kl": torch.cat(kl).cpu().numpy(), "entropy_0": torch.cat(entropy).cpu().numpy()}

    @staticmethod
    def _check(student: Policy, teacher: Policy) -> None:
        for name in ("vocab_size", "delays"):
            ours, theirs = getattr(student, name), getattr(teacher, name)
            if ours != theirs:
                raise ValueError(
                    f"the system has {name}={ours} and the teacher {theirs}: there is no divergence between "
                    "them"
                )


def code_digest(*modules: str) -> list[str]:
    """Hashes of modules' source: a rule that was changed must not be answered from the cache."""
    paths = [getattr(sys.modules[name], "__file__", None) for name in modules]
    return [file_digest(Path(path)) if path else "unknown" for path in paths]


def _distribution(
    policy: Policy, codes: Tensor, condition: TextCondition, sampling: SamplingSettings
) -> Tensor:
    """Log-probabilities [B, K, T, V] under which the codes are drawn."""
    logits = policy.code_logits(codes, condition)
    if sampling.guided:
        null = policy.code_logits(codes, policy.null(condition))
        scale = sampling.guidance_scale
        scale = torch.tensor(scale, device=codes.device) if isinstance(scale, tuple) else scale
        guided = guided_logits(logits, null, scale)
        if sampling.adaptive_guidance is not None:
            logits = torch.where(_before_agreement(policy, logits, null, sampling), guided, logits)
        else:
            logits = guided
    logits = sampling_logits(logits, sampling)
    if sampling.greedy:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True), -torch.inf)
    return logits.log_softmax(dim=-1)


def compute_features(
    clips: Batch,
    description: Mapping[str, Any],
    features: Sequence[Feature],
    cache: Cache,
    progress: Progress | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """All features of clips, from the cache or newly computed.

    Args:
        clips: of one replicate and seed; its model is loaded only if something is missing.
        description: of the clips, see `generations.describe`.
        features: what is wanted.
        cache: where it is kept.
        progress: told the number of clips done.
    """
    keys = {feature.name: {"clips": dict(description), **feature.fingerprint} for feature in features}
    found = {name: cache.load("features", key) for name, key in keys.items()}
    missing = [feature for feature in features if found[feature.name] is None]
    for name, rows in (_computed(clips, missing, progress) if missing else {}).items():
        cache.save("features", keys[name], rows)
        found[name] = rows
    return {name: rows for name, rows in found.items() if rows is not None}


def _computed(
    clips: Batch, features: Sequence[Feature], progress: Progress | None
) -> dict[str, dict[str, np.ndarray]]:
    parts: dict[str, list[dict[str, np.ndarray]]] = {feature.name: [] for feature in features}
    with EVALUATION.measured(torch.device(clips.player.device).type) as done:
        for start in range(0, len(clips.codes), _CHUNK):
            batch = clips[start : start + _CHUNK]
            for feature in features:
                computed = feature.compute(batch)
                wrong = [name for name, values in computed.items() if len(values) != len(batch.prompts)]
                if wrong:
                    raise ValueError(f"feature {feature.name!r}: {wrong[0]!r} has not one row per clip")
                parts[feature.name].append(computed)
            if progress:
                progress(len(batch.prompts))
            done(len(batch.prompts))
    return {
        name: {column: np.concatenate([part[column] for part in of_feature]) for column in of_feature[0]}
        for name, of_feature in parts.items()
    }


def _before_agreement(policy: Policy, cond: Tensor, null: Tensor, sampling: SamplingSettings) -> Tensor:
    """Which codes of adaptive guidance were drawn under γ [B, K, T, 1]; a step holds codes of different frames."""
    assert sampling.adaptive_guidance is not None
    variation, delays, frames = total_variation(cond, null), policy.delays, cond.shape[2]
    steps = variation.new_zeros(2, len(cond), frames + max(delays))
    for codebook, delay in enumerate(delays):
        steps[0, :, delay : delay + frames] += variation[:, codebook]
        steps[1, :, delay : delay + frames] += 1
    guided = before_agreement(steps[0] / steps[1], *sampling.adaptive_guidance)
    return torch.stack([guided[:, delay : delay + frames] for delay in delays], dim=1)[..., None]


def _floats(columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}


def reference_embeddings(
    folder: str | Path, feature: EmbeddingFeature, clip_seconds: float, cache: Cache
) -> np.ndarray:
    """Embeddings of the audio files of a folder, cut into clips of the length that is evaluated [C, D].

    Each file has its own sampling rate, which the encoder is told. Files shorter than a clip are left out.

    Args:
        folder: with audio files, also in folders below.
        feature: of the held-out encoder; it must read waveforms.
        clip_seconds: length of a clip.
        cache: where the embeddings are kept.

    Raises:
        FileNotFoundError: no such folder, or no audio in it.
        ValueError: an encoder that reads codes, a file that is no audio, or fewer than two clips.
    """
    folder = Path(folder)
    if feature.embedder.reads != "waveforms":
        raise ValueError(
            f"encoder {feature.embedder.name!r} reads codes, and reference audio has none: take one that "
            "reads waveforms as heldout_encoder"
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"reference folder {folder} holds no audio ({', '.join(_EXTENSIONS)})")
    description = {
        "files": digest([file_digest(path) for path in files]),
        "clip_seconds": clip_seconds,
        **feature.fingerprint,
    }
    kept = cache.load("reference", description)
    if kept is not None:
        return kept["values"]
    parts = [_embed_recording(path, feature, clip_seconds) for path in files]
    values = np.concatenate([part for part in parts if part is not None] or [np.empty((0, 1))])
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < 2:
        raise ValueError(
            f"{folder} gives {len(values)} clips of {clip_seconds:g} s, and a distribution needs at least "
            "2: add files"
        )
    cache.save("reference", description, {"values": values})
    return values


def _embed_recording(path: Path, feature: EmbeddingFeature, clip_seconds: float) -> np.ndarray | None:
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as audio ({error}): remove or repair it") from error
    length = round(clip_seconds * rate)
    mono = torch.from_numpy(audio).mean(dim=1)
    count = len(mono) // length
    if not count:
        return None
    return feature.embed(mono[: count * length].view(count, length), rate)
