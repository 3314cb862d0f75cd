"""Reward functions for the trainer, called as TRL calls any reward function, with audio in the place of text.

    reward(prompts=…, completions=…, num_generations=…, sampling_rate=…, codes=…, waveforms=…, **columns)

returns one number (or None: does not apply) per clip. `columns` are those of the dataset; a name that is taken
keeps its meaning. `completions` holds one waveform per clip, or one grid of codes when nothing asked for audio.
The rows of a prompt are adjacent and complete. A function that declares `reads = "codes"` spares the decoding
when no other wants audio.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diverse_cfg.acoustics import WHITE_FLATNESS, validity
from diverse_cfg.config import GuardConfig
from diverse_cfg.embeddings import Embedder, load_embedder
from diverse_cfg.embeddings.audio import resample, to_mono
from diverse_cfg.functional.diversity import pairwise_cosine_distance


class DiversityReward:
    """r_i: mean embedding distance of a clip to the other clips of its prompt (arXiv 2410.06084).

    Args:
        embedder: E, or the id or folder of one.
        guards: see `GuardConfig`; none by default.
    """

    __name__ = "diversity"
    pairwise = True

    def __init__(self, embedder: Embedder | str, guards: GuardConfig | None = None):
        self.embedder = load_embedder(embedder) if isinstance(embedder, str) else embedder
        self.guards = guards or GuardConfig()
        self.distance_cap: float | None = None
        self.embeddings: Tensor | None = None
        self.distances: Tensor | None = None

    @property
    def reads(self) -> str:
        """What must be handed over: "waveforms", or "codes" where neither embedder nor guard listens."""
        return "waveforms" if self.guards.listens else self.embedder.reads

    def __call__(
        self,
        completions: Any = None,
        *,
        num_generations: int,
        sampling_rate: int,
        codes: Tensor | None = None,
        waveforms: Tensor | None = None,
        **_: Any,
    ) -> list[float]:
        """Rewards of N clips; `embeddings` [N, D] and `distances` [P, G, G] stay for the trainer."""
        inputs = codes if self.embedder.reads == "codes" else waveforms
        if inputs is None:
            inputs = torch.stack(list(completions))
        if len(inputs) % num_generations or num_generations < 2:
            raise ValueError(
                f"DiversityReward got {len(inputs)} clips in groups of {num_generations}: it needs whole "
                "groups of at least 2 clips per prompt"
            )
        self.embeddings = embed_clips(self.embedder, inputs, sampling_rate)
        distances = embedding_distances(self.embedder, self.embeddings, num_generations)
        if self.distance_cap is not None:
            distances = distances.clamp(max=self.distance_cap)
        if self.guards.listens:
            assert waveforms is not None  # `reads` asked for them
            distances = mask_pairs(distances, valid_audio(waveforms, sampling_rate, self.guards))
        self.distances = distances
        return mean_distances(distances).flatten().tolist()


class TextAdherenceReward:
    """Cosine between a clip and its prompt in an embedding space of both, such as CLAP's.

    Args:
        embedder: has `embed` and `embed_text`, e.g. `ClapEmbedder`; or the id or folder of a CLAP checkpoint.
    """

    __name__ = "text_adherence"
    reads = "waveforms"

    def __init__(self, embedder: Any = "laion/larger_clap_music"):
        self.embedder = load_embedder(embedder) if isinstance(embedder, str) else embedder
        if not hasattr(self.embedder, "embed_text"):
            raise ValueError(
                f"embedder {getattr(self.embedder, 'name', self.embedder)!r} has no text tower: use a CLAP "
                "checkpoint"
            )

    def __call__(
        self, prompts: Sequence[str], *, sampling_rate: int, waveforms: Tensor, **_: Any
    ) -> list[float]:
        """Cosines of N clips."""
        audio = embed_clips(self.embedder, waveforms, sampling_rate)
        distinct = list(dict.fromkeys(prompts))
        text = self.embedder.embed_text(distinct).to(audio)
        rows = [distinct.index(prompt) for prompt in prompts]
        return torch.cosine_similarity(audio, text[rows], dim=1).tolist()


class AestheticsReward:
    """Audiobox-Aesthetics (arXiv 2502.05139): how a listener would rate the clip, about 1 to 10.

    The package `audiobox_aesthetics` is installed with `--no-deps` (its metadata pulls torchaudio, which is
    not needed here); its weights are CC-BY-4.0.

    Args:
        axis: "CE" content enjoyment, "CU" usefulness, "PC" complexity, or "PQ" production quality.
        model: an `AesMultiOutput`; by default that of the Hub.
        device: where it runs; the GPU when there is one.
    """

    reads = "waveforms"
    sampling_rate = 16_000
    window_seconds = 10

    def __init__(self, axis: str = "CE", model: Any = None, device: str | None = None):
        if axis not in ("CE", "CU", "PC", "PQ"):
            raise ValueError(f"axis={axis!r} must be one of CE, CU, PC, PQ")
        if model is None:
            try:
                from audiobox_aesthetics.model.aes import AesMultiOutput
            except ImportError as error:
                raise ImportError(
                    "AestheticsReward needs audiobox_aesthetics: pip install '.[eval]' in a clone, then "
                    "pip install --no-deps audiobox_aesthetics"
                ) from error
            model = AesMultiOutput.from_pretrained("facebook/audiobox-aesthetics")
        self.__name__ = f"aesthetics_{axis.lower()}"
        self.axis = axis
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.scale = model.target_transform[axis]

    @torch.no_grad()
    def __call__(self, *, sampling_rate: int, waveforms: Tensor, **_: Any) -> list[float]:
        """Scores of N clips; of a long clip the mean over windows of 10 s, weighted by their length."""
        audio = resample(to_mono(waveforms.to(self.device)), sampling_rate, self.sampling_rate)
        window = self.window_seconds * self.sampling_rate
        total, weight = torch.zeros(len(audio), device=self.device), 0
        for start in range(0, audio.shape[1], window):
            part = audio[:, None, start : start + window]
            length = part.shape[2]
            part = torch.nn.functional.pad(part, (0, window - length))
            mask = torch.zeros_like(part, dtype=torch.bool)
            mask[..., :length] = True
            total += length * self.model({"wav": part, "mask": mask})[self.axis].float()
            weight += length
        return (total / weight * self.scale["std"] + self.scale["mean"]).tolist()


def embed_clips(embedder: Embedder, inputs: Tensor, sampling_rate: int) -> Tensor:
    """Embeddings [N, D] in float32 or float64, checked: one finite row per clip.

    Raises:
        ValueError: wrong shape, or a clip (named) without a finite embedding.
    """
    with torch.no_grad():
        embeddings = embedder.embed(inputs, sampling_rate=sampling_rate)
    name = getattr(embedder, "name", type(embedder).__name__)
    if embeddings.ndim != 2 or len(embeddings) != len(inputs):
        raise ValueError(
            f"embedder {name!r} returned shape {tuple(embeddings.shape)} for {len(inputs)} clips; it must "
            "return [B, D]"
        )
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    broken = ~torch.isfinite(embeddings).all(dim=1)
    if bool(broken.any()):
        raise ValueError(f"embedder {name!r} returned non-finite values for clip {int(broken.nonzero()[0])}")
    return embeddings


def embedding_distances(embedder: Embedder, embeddings: Tensor, num_generations: int) -> Tensor:
    """Distances of the clips of each prompt [P, G, G], from embeddings [N, D]: the embedder's own, else cosines."""
    measure = getattr(embedder, "distances", pairwise_cosine_distance)
    return measure(embeddings.unflatten(0, (-1, num_generations)))


def mean_distances(distances: Tensor) -> Tensor:
    """r_i = Σ_{j≠i} d_ij / (G − 1): [P, G, G] → [P, G]; the diagonal is 0."""
    return distances.sum(dim=-1) / (distances.shape[-1] - 1)


def mask_pairs(distances: Tensor, weights: Tensor) -> Tensor:
    """d_ij · w_i · w_j for weights of clips [N]: still of pairs, so that the estimator stays unbiased."""
    weights = weights.to(distances).view(distances.shape[:2])
    return distances * weights[:, :, None] * weights[:, None, :]


def valid_audio(waveforms: Tensor, sampling_rate: int, guards: GuardConfig) -> Tensor:
    """Which clips keep the guards' limits [N], measured as the evaluation measures validity: by the worst channel.

    Args:
        waveforms: [N, L] or [N, 2, L].
        sampling_rate: in Hz.
        guards: the limits; those that are None do not count.
    """
    found = validity(waveforms, sampling_rate)
    valid = torch.ones_like(found["valid"])
    if guards.silence_dbfs is not None:
        valid &= found["level_dbfs"] >= guards.silence_dbfs
    for name, limit, unit in (
        ("silent_fraction", guards.max_silence, 1),
        ("clipped_fraction", guards.max_clipping, 1),
        ("flatness", guards.max_flatness, WHITE_FLATNESS),
    ):
        if limit is not None:
            valid &= found[name] <= limit * unit
    return valid


def is_pairwise(reward_func: Any) -> bool:
    """Whether a reward depends on the other clips of its prompt, and so needs the diversity estimator."""
    return bool(getattr(reward_func, "pairwise", False))


def reads_waveforms(reward_func: Any) -> bool:
    """Whether a reward function needs decoded audio; one that does not say so does."""
    return getattr(reward_func, "reads", "waveforms") != "codes"


def is_async(reward_func: Callable) -> bool:
    """Whether calling the function gives a coroutine; also a callable object or a partial of one."""
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(
        getattr(reward_func, "__call__", None)  # noqa: B004
    )


def keywords(reward_func: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that a reward function names, and whether it takes others too."""
    try:
        found = inspect.signature(reward_func).parameters
    except (TypeError, ValueError):  # written in C
        return {}, True
    named = {
        name: parameter
        for name, parameter in found.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return named, any(parameter.kind == parameter.VAR_KEYWORD for parameter in found.values())


def checked(reward_func: Callable, name: str, prompts: list[str], context: dict[str, Any]) -> Callable:
    """Wrap a reward function: hand it the `context` (audio, columns), and refuse unusable rewards by name.

    TRL turns None into NaN and drops NaN from the sum, so a broken reward would silently train something
    else.
    """
    pairwise = is_pairwise(reward_func)
    named, is_open = keywords(reward_func)

    def arguments(of_trl: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in {**context, **of_trl}.items() if is_open or name in named}

    def verified(rewards: Any) -> list[float | None]:
        found = rewards.tolist() if hasattr(rewards, "tolist") else rewards
        listed = isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping)
        found = list(found) if listed else []
        if not listed or len(found) != len(prompts):
            what = f"{len(found)} rewards" if listed else _short(rewards)
            raise ValueError(
                f"reward function {name!r} returned {what} for {len(prompts)} clips, the first of prompt "
                f"{prompts[0]!r}; return a list with one number per clip"
            )
        for index, (reward, prompt) in enumerate(zip(found, prompts, strict=True)):
            if (reward is None and pairwise) or not (reward is None or _is_finite(reward)):
                remedy = "" if pairwise else "return None if it does not apply, or "
                raise ValueError(
                    f"reward function {name!r} returned {_short(reward)} for clip {index} (prompt {prompt!r}); "
                    f"{remedy}fix the function"
                )
        return [None if reward is None else float(reward) for reward in found]

    async def call_async(**kwargs):
        return verified(await reward_func(**arguments(kwargs)))

    def call(**kwargs):
        return verified(reward_func(**arguments(kwargs)))

    return call_async if is_async(reward_func) else call


def _is_finite(reward: Any) -> bool:
    """Whether it is a number that float32 can hold."""
    try:
        return not isinstance(reward, str | bytes) and abs(float(reward)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no number, a tensor of several, a huge one
        return False


def _short(value: Any) -> str:
    return repr(value)[:60]
