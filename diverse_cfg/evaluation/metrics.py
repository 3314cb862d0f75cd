"""The registry of metrics: what each name means, what it needs, and how it is computed.

`require` refuses names that do not exist, and metrics whose ingredients are missing, before anything is
generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from diverse_cfg.evaluation.measures import (
    Cells,
    OfSet,
    clip_mean,
    codebook_entropy,
    different_prompts,
    timing_mean,
    to_reference,
    within_prompt_distance,
    within_prompt_vendi,
)
from diverse_cfg.functional.statistics import frechet_distance, mmd


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
    cells: Cells | None = None
    of_set: OfSet | None = None
    unit: str = ""
    min_generations: int = 1
    min_prompts: int = 1
    cluster: str = "prompt"
    is_share: bool = False


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
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}; known: {', '.join(METRICS)}")
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


# ---- quality -------------------------------------------------------------------------------------

_ATTRIBUTES = {"judge": ("instrument", "tempo", "register", "key"), "rules": ("tempo", "register", "key")}
for _feature, _name, _label, _how in (
    ("judge", "adherence", "prompt adherence", "judged by a network that took no part in training"),
    ("rules", "rules", "prompt adherence by rules", "judged without any network"),
):
    _text = f"Share of the attributes named in the prompt that a clip has, {_how}."
    register(Metric(_name, _label, _text, 1, (_feature,), clip_mean(_feature, "mean"), is_share=True))
    for _column in _ATTRIBUTES[_feature]:
        _text = f"Share of clips with the {_column} that the prompt names, {_how}."
        register(
            Metric(
                f"{_name}/{_column}",
                f"{_label}: {_column}",
                _text,
                1,
                (_feature,),
                clip_mean(_feature, _column),
                is_share=True,
            )
        )

register(
    Metric(
        "kl_teacher",
        "KL to the guided teacher",
        "KL of the distributions that the codes were drawn from to the guided teacher's, on own clips, "
        "summed over all codes of a clip.",
        -1,
        ("divergence",),
        clip_mean("divergence", "kl"),
        unit="nats per clip",
    )
)

for _name, _label, _text in (
    ("text", "text adherence", "Cosine between a clip and its prompt under a CLAP model."),
    ("aesthetics_ce", "content enjoyment", "Audiobox-Aesthetics CE of a clip, about 1 to 10."),
    ("aesthetics_pq", "production quality", "Audiobox-Aesthetics PQ of a clip, about 1 to 10."),
):
    register(Metric(_name, _label, _text, 1, (_name,), clip_mean(_name, "score")))

# ---- diversity -----------------------------------------------------------------------------------

for _name, _mark, _text in (
    ("heldout", "", "an encoder that was never rewarded"),
    ("reward", " (reward encoder)", "the encoder of the diversity reward"),
):
    register(
        Metric(
            f"diversity_{_name}",
            f"diversity{_mark}",
            f"Mean cosine distance of two clips of one prompt, under {_text}.",
            1,
            (_name,),
            within_prompt_distance(_name),
            min_generations=2,
        )
    )
    register(
        Metric(
            f"vendi_{_name}",
            f"Vendi score{_mark}",
            f"Effective number of different clips among those of one prompt, under {_text}.",
            1,
            (_name,),
            within_prompt_vendi(_name),
            min_generations=2,
        )
    )
    register(
        Metric(
            f"different_prompts_{_name}",
            f"distance between prompts{_mark}",
            f"Mean cosine distance of two clips of two different prompts, under {_text}; the base's is an "
            "upper bound of diversity.",
            0,
            (_name,),
            of_set=different_prompts(_name),
            min_prompts=2,
        )
    )
register(
    Metric(
        "codebook0_entropy",
        "token entropy",
        "Entropy of the codes of codebook 0 in all clips of one prompt.",
        1,
        ("codes",),
        codebook_entropy(0),
        unit="nats",
    )
)
register(
    Metric(
        "policy_entropy",
        "entropy of the policy",
        "Mean entropy of the distributions that the codes of codebook 0 were drawn from; less is colder.",
        0,
        ("divergence",),
        clip_mean("divergence", "entropy_0"),
        unit="nats per code",
    )
)

# ---- distance to reference audio -----------------------------------------------------------------

register(
    Metric(
        "frechet",
        "Fréchet distance",
        "Fréchet distance to reference audio under the held-out encoder; biased upwards for few clips.",
        -1,
        ("heldout", "reference"),
        of_set=to_reference(frechet_distance),
    )
)
register(
    Metric(
        "mmd",
        "MMD²",
        "Unbiased squared maximum mean discrepancy to reference audio under the held-out encoder.",
        -1,
        ("heldout", "reference"),
        of_set=to_reference(mmd),
    )
)

# ---- soundness of the audio ----------------------------------------------------------------------

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
):
    _mean = clip_mean("validity", _column)
    register(Metric(_name, _label, _text, _better, ("validity",), _mean, unit=_unit, is_share=not _unit))

# ---- cost ----------------------------------------------------------------------------------------

register(
    Metric(
        "decoder_rows",
        "decoder rows",
        "Rows that the decoder computes for one clip: its steps, twice with guidance.",
        -1,
        ("timing",),
        timing_mean("decoder_rows"),
        unit="per clip",
    )
)
register(
    Metric(
        "seconds",
        "sampling time",
        "Seconds to sample the codes of one clip, in batches, on the machine that the results name.",
        -1,
        ("timing",),
        timing_mean("seconds"),
        unit="s per clip",
        cluster="batch",
    )
)
