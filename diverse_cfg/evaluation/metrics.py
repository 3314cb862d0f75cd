"""From features to numbers: the measures, and the registry that says what each name means and what it needs.

A measure per prompt gives means over the clips of each prompt, whose mean over prompts is the table's number; a
measure of the whole set (Fréchet, MMD, the upper bound) has one number of all clips. `require` refuses names that do
not exist, and metrics whose ingredients are missing, before anything is generated.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diverse_cfg.facets import facet_distances
from diverse_cfg.functional.diversity import pairwise_cosine_distance, unit_embeddings, vendi_score
from diverse_cfg.functional.statistics import frechet_distance, mmd


@dataclass(frozen=True)
class Replicate:
    """Features of the clips of one training seed, and what they are compared with.

    Args:
        features: feature → column → rows [P, S, G, ...], S sampling seeds; `timing` is what generating the clips took
            (`seconds`, `batch`, `decoder_rows`).
        codes: [P, S, G, K, T].
        reference: embeddings of reference audio under the held-out encoder [C, D], or None.
    """

    features: Mapping[str, Mapping[str, np.ndarray]]
    codes: np.ndarray
    reference: np.ndarray | None = None

    def clips(self, feature: str, column: str) -> np.ndarray:
        """Rows [P, S·G] of one column."""
        rows = self.features[feature][column]
        return rows.reshape(rows.shape[0], -1)

    def groups(self, encoder: str) -> Tensor:
        """Embeddings [P, S, G, D]; NaN rows where a clip has none."""
        return torch.from_numpy(self.features[encoder]["values"])


ByPrompt = Callable[[Replicate], np.ndarray]
"""A measure per prompt: the *cells* of a replicate, means over the clips of each prompt [P]; NaN without a value."""

OfSet = Callable[[Replicate], Callable[[Tensor], float]]
"""A measure of a whole set: a function of which prompts it is taken of, so that an interval can leave some out."""


# ---- means over clips ----------------------------------------------------------------------------


def clip_mean(feature: str, column: str) -> ByPrompt:
    """Cells: mean of a column over the clips of each prompt; NaN where no clip of the prompt has a value."""

    def cells(replicate: Replicate) -> np.ndarray:
        rows = replicate.clips(feature, column)
        known = np.isfinite(rows)
        counts = known.sum(axis=1)
        sums = np.where(known, rows, 0).sum(axis=1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    return cells


# ---- diversity -----------------------------------------------------------------------------------


def _usable(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings, and which clips have one; a clip without counts as a copy of its group's first that
    has."""
    usable = torch.isfinite(embeddings).all(dim=-1)
    first = usable.double().argmax(dim=-1)[..., None, None].expand_as(embeddings[..., :1, :])
    copied = torch.where(usable[..., None], embeddings, embeddings.gather(-2, first))
    anything = torch.isfinite(copied).all(dim=-1, keepdim=True)  # a group without any clip is all one clip
    return unit_embeddings(torch.where(anything, copied, torch.ones_like(copied)).double()), usable


def within_prompt_distance(encoder: str) -> ByPrompt:
    """Cells: mean pairwise cosine distance inside each group, averaged over the sampling seeds.

    A clip without an embedding (silence) has distance 0 to every other: breaking must not pay.
    """

    def cells(replicate: Replicate) -> np.ndarray:
        embeddings, usable = _usable(replicate.groups(encoder))
        distances = pairwise_cosine_distance(embeddings.flatten(0, 1))
        known = usable.flatten(0, 1)
        distances = distances * known[:, :, None] * known[:, None, :]
        count = distances.shape[-1] * (distances.shape[-1] - 1)
        return (distances.sum(dim=(1, 2)) / count).view(usable.shape[:2]).mean(dim=1).numpy()

    return cells


def within_prompt_vendi(encoder: str) -> ByPrompt:
    """Cells: Vendi score of each group, averaged over the sampling seeds."""

    def cells(replicate: Replicate) -> np.ndarray:
        embeddings, _ = _usable(replicate.groups(encoder))
        return vendi_score(embeddings).mean(dim=1).numpy()

    return cells


def different_prompts(encoder: str) -> OfSet:
    """Mean distance of two clips of two different prompts: the upper bound of the paper's figures.

        U = mean_{p≠q} (1 − m_p·m_q),   m_p = mean of the unit embeddings of prompt p

    which is the mean over all pairs of clips, since 1 − e·e' is linear in either clip. Clips without an
    embedding (silence), and prompts of nothing else, are left out.
    """

    def of_set(replicate: Replicate) -> Callable[[Tensor], float]:
        embeddings, usable = _usable(replicate.groups(encoder))
        known = embeddings.flatten(1, 2) * usable.flatten(1)[..., None]
        counts = usable.flatten(1).sum(dim=1)
        means = known.sum(dim=1) / counts.clamp(min=1)[:, None]
        distances = 1 - means @ means.mT

        def statistic(prompts: Tensor) -> float:
            sounding = prompts[counts[prompts] > 0]
            if len(sounding) < 2:
                return math.nan
            pairs = distances[sounding][:, sounding]
            return float((pairs.sum() - pairs.trace()) / (len(pairs) * (len(pairs) - 1)))

        return statistic

    return of_set


def clean_clips(replicate: Replicate) -> Tensor:
    """Which clips count for the clean measures [P, S, G]: they are valid, do not end in silence of 0.4 s or more,
    and have all that their prompt names, where a judge can tell."""
    clean = replicate.features["validity"]["valid"] == 1
    clean &= replicate.features["validity"]["dying"] == 0
    if "judge" in replicate.features:
        clean &= ~(replicate.features["judge"]["mean"] < 1)  # NaN where a prompt names nothing
    return torch.from_numpy(clean)


def clean_share(replicate: Replicate) -> np.ndarray:
    """Cells: share of the clips that are clean."""
    return clean_clips(replicate).double().mean(dim=(1, 2)).numpy()


def clean_prompts(replicate: Replicate) -> np.ndarray:
    """Cells: 1 for a prompt that has two clean clips under some seed, so that a distance exists, else 0."""
    return (clean_clips(replicate).sum(dim=2) >= 2).any(dim=1).double().numpy()


def among_clean(distances: Callable[[Replicate], Tensor]) -> ByPrompt:
    """Cells: mean distance of two clean clips of one prompt and seed; NaN for a prompt without such a pair.

    Args:
        distances: gives them for all clips [P, S, G, G].
    """

    def cells(replicate: Replicate) -> np.ndarray:
        clean, found = clean_clips(replicate), distances(replicate)
        pairs = clean[..., None, :] & clean[..., :, None]
        pairs &= ~torch.eye(clean.shape[-1], dtype=torch.bool)
        sums = torch.where(pairs, found, 0).sum(dim=(1, 2, 3))
        return (sums / pairs.sum(dim=(1, 2, 3))).numpy()

    return cells


def embedding_distances(encoder: str) -> Callable[[Replicate], Tensor]:
    """Cosine distances of the clips of each prompt and seed [P, S, G, G]."""

    def of_all(replicate: Replicate) -> Tensor:
        embeddings, _ = _usable(replicate.groups(encoder))
        return pairwise_cosine_distance(embeddings.flatten(0, 1)).unflatten(0, embeddings.shape[:2])

    return of_all


def distances_of(facet: str) -> Callable[[Replicate], Tensor]:
    """Distances of the clips of each prompt and seed in one facet [P, S, G, G]."""
    return lambda replicate: facet_distances(facet, replicate.features["facets"][facet])


def codebook_entropy(codebook: int = 0) -> ByPrompt:
    """Cells: entropy (nats) of the codes of one codebook in all clips of a prompt under one seed."""

    def cells(replicate: Replicate) -> np.ndarray:
        tokens = replicate.codes[:, :, :, codebook]
        groups = tokens.reshape(tokens.shape[0], tokens.shape[1], -1)
        return np.array([np.mean([_entropy(group) for group in of_prompt]) for of_prompt in groups])

    return cells


def _entropy(tokens: np.ndarray) -> float:
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(shares * np.log(shares)).sum())


# ---- distances to reference audio ----------------------------------------------------------------


def to_reference(distance: Callable[[Tensor, Tensor], float]) -> OfSet:
    """Distance of the prompts' clips to reference audio, in the held-out encoder's space; NaN for less than
    two clips with an embedding."""

    def of_set(replicate: Replicate) -> Callable[[Tensor], float]:
        embeddings = replicate.groups("heldout").flatten(1, 2).double()
        reference = torch.from_numpy(np.asarray(replicate.reference)).double()
        usable = torch.isfinite(embeddings).all(dim=-1)

        def statistic(prompts: Tensor) -> float:
            clips = embeddings[prompts][usable[prompts]]
            return distance(clips, reference) if len(clips) >= 2 else math.nan

        return statistic

    return of_set


# ---- the registry --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One column of the table.

    Args:
        name: in configurations and results.
        label: on axes and in tables.
        explanation: one sentence for the glossary.
        better: +1 if more is better, −1 if less is, 0 if neither.
        needs: features (see `features`), "codes", "timing" or "reference".
        cells: the measure, of metrics per prompt.
        of_set: the measure, of metrics of the whole set.
        unit: "" where it has none.
        min_generations: clips per prompt that it needs.
        min_prompts: prompts that it needs.
        cluster: what is independent: "prompt", or "batch" for what the clips of a batch share.
        is_share: whether it lies between 0 and 1, where its interval is cut off.
    """

    name: str
    label: str
    explanation: str
    better: int
    needs: tuple[str, ...]
    cells: ByPrompt | None = None
    of_set: OfSet | None = None
    unit: str = ""
    min_generations: int = 1
    min_prompts: int = 1
    cluster: str = "prompt"
    is_share: bool = False

    @property
    def axis(self) -> str:
        """Label with the unit, if it has one."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> None:
    """Add a metric to the registry.

    Raises:
        ValueError: the name is taken, or it has not exactly one measure.
    """
    if metric.name in METRICS:
        raise ValueError(f"there is a metric {metric.name!r} already")
    if (metric.cells is None) == (metric.of_set is None):
        raise ValueError(f"metric {metric.name!r} needs either cells or of_set")
    METRICS[metric.name] = metric


def require_known(names: Iterable[str]) -> None:
    """Refuse names that are no metric, by a ValueError that lists what there is."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}; known: {', '.join(METRICS)}")


def require(
    names: Sequence[str] | None, available: set[str], num_generations: int, num_prompts: int
) -> list[Metric]:
    """The metrics of these names; for None every metric whose ingredients are there.

    Args:
        names: as configured.
        available: features and other ingredients that this evaluation has.
        num_generations: G.
        num_prompts: P.

    Raises:
        ValueError: a name that does not exist, or a metric that cannot be computed, with the remedy.
    """
    if names is None:
        return [m for m in METRICS.values() if not _obstacle(m, available, num_generations, num_prompts)]
    if isinstance(names, str) or not names:
        raise ValueError(
            f"metrics must be a list of names, got {names!r}; leave it out for all that can be computed"
        )
    require_known(names)
    for name in names:
        obstacle = _obstacle(METRICS[name], available, num_generations, num_prompts)
        if obstacle:
            raise ValueError(f"metric {name!r} {obstacle}, or leave the metric out")
    return [METRICS[name] for name in dict.fromkeys(names)]


_REMEDIES = {
    "reward": "needs reward_encoder: the encoder of the diversity reward",
    "heldout": "needs heldout_encoder: an encoder that was not the reward",
    "judge": "needs judge: a folder with an attribute judge",
    "rules": "needs prompts of the nano world, whose attributes rules can hear",
    "text": "needs text_encoder: a CLAP checkpoint",
    "aesthetics_ce": "needs aesthetics: true, and the package audiobox_aesthetics",
    "aesthetics_pq": "needs aesthetics: true, and the package audiobox_aesthetics",
    "divergence": "needs teacher: the guided model that students were distilled from",
    "reference": "needs reference: a folder of reference audio",
}


def _obstacle(metric: Metric, available: set[str], num_generations: int, num_prompts: int) -> str:
    missing = [need for need in metric.needs if need not in available]
    if missing:
        return _REMEDIES.get(missing[0], f"needs {missing[0]!r}, which this evaluation does not have")
    if num_generations < metric.min_generations:
        return f"needs num_generations >= {metric.min_generations}, got {num_generations}: raise it"
    if num_prompts < metric.min_prompts:
        return f"needs at least {metric.min_prompts} prompts, got {num_prompts}: add some"
    return ""


# ---- what there is, in the order of the table ----------------------------------------------------

_ATTRIBUTES = {"judge": ("instrument", "tempo", "register", "key"), "rules": ("tempo", "register", "key")}
for _feature, _name, _label, _how in (
    ("judge", "adherence", "prompt adherence", "judged by a network that took no part in training"),
    ("rules", "rules", "prompt adherence by rules", "judged without any network"),
):
    _text = f"Share of the attributes named in the prompt that a clip has, {_how}."
    register(Metric(_name, _label, _text, 1, (_feature,), clip_mean(_feature, "mean"), is_share=True))
    for _column in _ATTRIBUTES[_feature]:
        _of_one = (f"{_name}/{_column}", f"{_label}: {_column}")
        _text = f"Share of clips with the {_column} that the prompt names, {_how}."
        register(Metric(*_of_one, _text, 1, (_feature,), clip_mean(_feature, _column), is_share=True))

_text = (
    "KL of the distributions that the codes were drawn from to the guided teacher's, on own clips, summed over all "
    "codes of a clip."
)
_kl = clip_mean("divergence", "kl")
register(
    Metric("kl_teacher", "KL to the guided teacher", _text, -1, ("divergence",), _kl, unit="nats per clip")
)

for _name, _label, _text in (
    ("text", "text adherence", "Cosine between a clip and its prompt under a CLAP model."),
    ("aesthetics_ce", "content enjoyment", "Audiobox-Aesthetics CE of a clip, about 1 to 10."),
    ("aesthetics_pq", "production quality", "Audiobox-Aesthetics PQ of a clip, about 1 to 10."),
):
    register(Metric(_name, _label, _text, 1, (_name,), clip_mean(_name, "score")))

for _name, _mark, _under in (
    ("heldout", "", "under an encoder that was never rewarded"),
    ("reward", " (reward encoder)", "under the encoder of the diversity reward"),
):
    _label, _text = f"diversity{_mark}", f"Mean cosine distance of two clips of one prompt, {_under}."
    _measure = within_prompt_distance(_name)
    register(Metric(f"diversity_{_name}", _label, _text, 1, (_name,), _measure, min_generations=2))
    _label = f"Vendi score{_mark}"
    _text = f"Effective number of different clips among those of one prompt, {_under}."
    _measure = within_prompt_vendi(_name)
    register(Metric(f"vendi_{_name}", _label, _text, 1, (_name,), _measure, min_generations=2))
    _label = f"distance between prompts{_mark}"
    _text = (
        f"Mean cosine distance of two clips of two different prompts, {_under}; the base's is an upper bound of "
        "diversity."
    )
    _set = different_prompts(_name)
    register(Metric(f"different_prompts_{_name}", _label, _text, 0, (_name,), of_set=_set, min_prompts=2))

_clean = "clips that are valid, do not end in silence, and are what their prompt says where a judge can tell"
_needs = ("facets", "validity")
for _name, _label, _text, _measure in (
    ("clean", "clean clips", f"Share of {_clean}.", clean_share),
    ("clean_prompts", "prompts with clean clips", f"Share of prompts with two {_clean}.", clean_prompts),
):
    register(Metric(_name, _label, _text, 1, _needs, _measure, is_share=True))
for _name, _under in (("heldout", "an encoder that was never rewarded"), ("reward", "the reward's encoder")):
    _label = "clean diversity" + (" (reward encoder)" if _name == "reward" else "")
    _text = f"Mean cosine distance under {_under} of two clean clips of one prompt: {_clean}."
    _measure = among_clean(embedding_distances(_name))
    register(Metric(f"clean_{_name}", _label, _text, 1, (_name, *_needs), _measure, min_generations=2))
for _name, _better, _how in (
    ("melody", 1, "intervals, by edits"),
    ("rhythm", 1, "times between onsets, by edits"),
    ("pitch", 1, "shares of pitch classes"),
    ("timbre", 1, "strength of harmonics, 1 from 20 dB on"),
    ("level", 0, "RMS of what sounds, 1 from 20 dB on"),
    ("rests", 0, "share of quiet frames"),
):
    _text = f"Mean distance between 0 and 1 of two clean clips of one prompt in their {_name} ({_how})."
    _label, _measure = f"difference in {_name}", among_clean(distances_of(_name))
    register(Metric(f"clean_{_name}", _label, _text, _better, _needs, _measure, min_generations=2))

_text = "Entropy of the codes of codebook 0 in all clips of one prompt."
register(Metric("codebook0_entropy", "token entropy", _text, 1, ("codes",), codebook_entropy(0), unit="nats"))
_text = "Mean entropy of the distributions that the codes of codebook 0 were drawn from; less is colder."
_entropy_0 = clip_mean("divergence", "entropy_0")
register(
    Metric(
        "policy_entropy", "entropy of the policy", _text, 0, ("divergence",), _entropy_0, unit="nats per code"
    )
)

_text = "Fréchet distance to reference audio under the held-out encoder; biased upwards for few clips."
_needs = ("heldout", "reference")
register(Metric("frechet", "Fréchet distance", _text, -1, _needs, of_set=to_reference(frechet_distance)))
_text = "Unbiased squared maximum mean discrepancy to reference audio under the held-out encoder."
register(Metric("mmd", "MMD²", _text, -1, _needs, of_set=to_reference(mmd)))

for _name, _label, _column, _better, _unit, _text in (
    (
        "validity",
        "valid clips",
        "valid",
        1,
        "",
        "Share of clips that are audible, not clipped and not noise.",
    ),
    ("level", "level", "level_dbfs", 0, "dBFS", "RMS level of a clip."),
    ("clipping", "clipped samples", "clipped_fraction", -1, "", "Share of samples at full scale."),
    ("silence", "silent frames", "silent_fraction", -1, "", "Share of a clip that is silent."),
    ("dying", "dying clips", "dying", -1, "", "Share of clips that end in at least 0.4 s of silence."),
):
    _mean = clip_mean("validity", _column)
    register(Metric(_name, _label, _text, _better, ("validity",), _mean, unit=_unit, is_share=not _unit))

_text = "Rows that the decoder computes for one clip: its steps, twice with guidance."
_rows = clip_mean("timing", "decoder_rows")
register(Metric("decoder_rows", "decoder rows", _text, -1, ("timing",), _rows, unit="per clip"))
_text = "Seconds to sample the codes of one clip, in batches, on the machine that the results name."
_seconds = clip_mean("timing", "seconds")
register(
    Metric("seconds", "sampling time", _text, -1, ("timing",), _seconds, unit="s per clip", cluster="batch")
)
