"""`SweepConfig`: the YAML file of `diverse-cfg evaluate`, and how a `Sweep` is built from it.

    systems:
      - {name: base, model: nano}
      - {name: base guided, model: nano, guidance_scale: [2, 3, 5]}
      - {name: student, model: runs/diverse}
      - {name: base first, first: nano, first_frames: [5, 25], model: runs/diverse}
      - {name: LERP, checkpoints: [runs/quality, runs/diverse], merge_weight: "0:1:0.25"}
    output: runs/sweep
    compare_to: [base guided γ=3]

`nano` stands for the shipped base, judge, encoders and prompts. Everything is checked before anything is
generated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diverse_cfg.assets import source
from diverse_cfg.embeddings import load_embedder
from diverse_cfg.evaluation.cache import Cache
from diverse_cfg.evaluation.features import (
    AestheticsFeature,
    DivergenceFeature,
    EmbeddingFeature,
    FacetsFeature,
    Feature,
    JudgeFeature,
    RulesFeature,
    TextAdherenceFeature,
    ValidityFeature,
    reference_embeddings,
)
from diverse_cfg.evaluation.generations import ClipSet, Player
from diverse_cfg.evaluation.signatures import Arms
from diverse_cfg.evaluation.sweep import Sweep
from diverse_cfg.evaluation.systems import System, expand_systems, single
from diverse_cfg.nano.attributes import parse_prompt
from diverse_cfg.policies.loading import torch_device
from diverse_cfg.policies.sampler.draws import require_64_bits
from diverse_cfg.policies.sampler.rollout import check_backend
from diverse_cfg.prompts import load_prompts
from diverse_cfg.settings import field_types, require_settings, require_type


@dataclass
class SweepConfig:
    """Settings of an evaluation.

    Args:
        systems: entries, see `systems.expand_systems`.
        output: folder of the results; its cache lets a sweep go on and grow.
        prompts: held-out prompts: "nano", "nano-open", a folder, a file or a Hub dataset.
        prompts_split: of a folder or dataset.
        prompt_column: column that holds them.
        num_prompts: take the first so many; None takes all.
        num_generations: clips per prompt and seed; at least 2 for diversity.
        seeds: sampling seeds, the same for every system.
        clip_seconds: length of a clip; None takes the model's own, at most 10 s.
        teacher: the base whose guided distribution is the reference of the KL; None leaves the KL out.
        teacher_guidance_scale: γ of the teacher.
        judge: folder of an attribute judge, "nano", or None.
        reward_encoder: encoder of the diversity reward: "nano", a folder, an id, or None.
        heldout_encoder: an encoder that was not rewarded.
        text_encoder: a CLAP checkpoint for text adherence; not one that was the reward.
        aesthetics: also judge with Audiobox-Aesthetics, whose package and weights must be there.
        reference: folder of reference audio, for Fréchet and MMD.
        metrics: names; None for every metric whose ingredients are there.
        compare_to: systems that all others are compared with.
        x: metric on the front's horizontal axis; None takes diversity under the held-out encoder.
        y: metric on the front's vertical axis; None takes adherence.
        min_validity: share of valid clips below which a system is flagged.
        arms: which systems play which part in the paper's findings, see `signatures.Arms`; None tests none.
        gallery_prompts: prompts on the page to listen to; 0 makes none.
        gallery_generations: clips per prompt and system on that page.
        device: torch device; None takes a GPU if there is one.
        rollout_backend: "fast", or "transformers" for stock `generate`: the same clips up to rounding, slowly.
    """

    systems: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""
    prompts: str = "nano"
    prompts_split: str = "test"
    prompt_column: str | None = None
    num_prompts: int | None = None
    num_generations: int = 8
    seeds: list[int] = field(default_factory=lambda: [0])
    clip_seconds: float | None = None
    teacher: str | None = "nano"
    teacher_guidance_scale: float = 3.0
    judge: str | None = "nano"
    reward_encoder: str | None = "nano"
    heldout_encoder: str | None = "nano"
    text_encoder: str | None = None
    aesthetics: bool = False
    reference: str | None = None
    metrics: list[str] | None = None
    compare_to: list[str] = field(default_factory=list)
    x: str | None = None
    y: str | None = None
    min_validity: float = 0.9
    arms: dict[str, Any] | None = None
    gallery_prompts: int = 4
    gallery_generations: int = 4
    device: str | None = None
    rollout_backend: str = "fast"

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is missing: name the folder for the results")
        for name, annotation in field_types(SweepConfig).items():
            require_type(name, getattr(self, name), annotation)
        check_backend(self.rollout_backend)
        if not 0 <= self.min_validity <= 1:
            raise ValueError(f"min_validity={self.min_validity} must lie between 0 and 1")
        for name in ("num_prompts", "num_generations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        for seed in self.seeds:
            require_64_bits("seeds: seed", seed)
        if self.arms is not None:
            if not set(self.arms) <= set(field_types(Arms)) or not {
                "base",
                "guided",
                "quality",
                "diverse",
                "merges",
            } <= set(self.arms):
                raise ValueError(
                    "arms needs base, guided, quality, diverse and merges, may have sweeps and uniform, "
                    f"got {', '.join(self.arms)}"
                )
            for name, annotation in field_types(Arms).items():
                if self.arms.get(name) is not None:
                    require_type(f"arms: {name}", self.arms[name], annotation)
        for name in ("gallery_prompts", "gallery_generations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (no page) or more")
        no_splits = f"for the file {self.prompts}, which has no splits"
        idle = {
            "teacher_guidance_scale": (self.teacher is None, "without a teacher"),
            "gallery_generations": (self.gallery_prompts == 0, "with gallery_prompts=0, which makes no page"),
            "prompts_split": (Path(self.prompts).is_file(), no_splits),
        }
        for name, (does_nothing, where) in idle.items():
            if does_nothing and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect {where}: leave it out")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SweepConfig":
        """From plain values, refusing names that do not exist."""
        require_settings(values, field_types(cls), "the sweep")
        return cls(**values)


def build_sweep(config: SweepConfig) -> tuple[Sweep, list[System]]:
    """The protocol and the systems of a configuration; models are loaded later, one by one.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong or missing.
    """
    systems = planned_systems(config)
    device = torch_device(config.device)
    prompts = _held_out_prompts(config)
    cache = Cache(Path(config.output) / "cache")
    teacher = source(config.teacher or systems[0].replicates[0][0][0])
    player = Player(single(teacher)[0], device)
    num_frames, seconds = _length(player, config.clip_seconds)
    for system in systems:
        if system.first_frames >= num_frames:
            raise ValueError(
                f"system {system.name!r}: first_frames={system.first_frames} must be below the clip's {num_frames} "
                "frames"
            )
    seeds = tuple(config.seeds)
    clips = ClipSet(tuple(prompts), config.num_generations, num_frames, seeds, config.rollout_backend)
    features: list[Feature] = [ValidityFeature(), FacetsFeature()]
    if config.teacher:
        features.append(DivergenceFeature(player, teacher, config.teacher_guidance_scale))
    features += _judges(config, prompts, device)
    for name, encoder, part in (
        ("reward", config.reward_encoder, "reward-encoder"),
        ("heldout", config.heldout_encoder, "eval-encoder"),
    ):
        if encoder:
            path = source(encoder, part)
            features.append(EmbeddingFeature(name, load_embedder(path, device=device), path))
    reference = None
    if config.reference:
        heldout = [f for f in features if isinstance(f, EmbeddingFeature) and f.name == "heldout"]
        if not heldout:
            raise ValueError("reference needs heldout_encoder, in whose space distances are taken")
        reference = reference_embeddings(config.reference, heldout[0], seconds, cache)
    sweep = Sweep(
        clips,
        features,
        cache,
        metrics=config.metrics,
        reference=reference,
        min_validity=config.min_validity,
        device=device,
        settings={"clip_seconds": seconds, "teacher_guidance_scale": config.teacher_guidance_scale},
    )
    return sweep, systems


def _held_out_prompts(config: SweepConfig) -> list[str]:
    """Distinct prompts, in their order.

    Raises:
        ValueError: fewer than were asked for.
    """
    prompts_of = source(config.prompts, "prompts")
    rows = load_prompts(
        prompts_of, split=config.prompts_split, column=config.prompt_column, default_split="test"
    )
    prompts = list(dict.fromkeys(rows["prompt"]))
    if config.num_prompts is not None and len(prompts) < config.num_prompts:
        raise ValueError(
            f"{prompts_of} has {len(prompts)} different prompts, num_prompts={config.num_prompts}: lower it"
        )
    return prompts[: config.num_prompts]


def planned_systems(config: SweepConfig) -> list[System]:
    """The systems of a configuration; whatever else it names must be among them. Nothing is loaded.

    Raises:
        ValueError: wrong entries, or a name that is no system or series here.
    """
    systems = expand_systems(config.systems)
    names, series = [system.name for system in systems], list(dict.fromkeys(s.series for s in systems))
    known = {"system": names, "series": series, "system or series": list(dict.fromkeys(names + series))}
    wanted = [("compare_to", "system", name) for name in config.compare_to]
    if config.arms:
        arms = Arms(**config.arms)
        parts = ("base", "guided", "quality", "diverse", "uniform")
        wanted += [(f"arms: {part}", "system", name) for part in parts if (name := getattr(arms, part))]
        wanted.append(("arms: merges", "series", arms.merges))
        pooled = dict.fromkeys(name for pool in arms.pools.values() for name in pool)
        wanted += [("arms: sweeps", "system or series", name) for name in pooled]
    for setting, kind, name in wanted:
        if name not in known[kind]:
            raise ValueError(
                f"{setting} names {name!r}, which is no {kind} here; known: {', '.join(known[kind])}"
            )
    return systems


def _judges(settings: SweepConfig, prompts: list[str], device: str) -> list[Feature]:
    features: list[Feature] = []
    if settings.judge:
        # Imported where it is used: prompts of another world need no judge, and no part of the nano world.
        from diverse_cfg.nano.judge import AttributeJudge

        path = source(settings.judge, "judge")
        features.append(JudgeFeature(AttributeJudge.from_pretrained(path), path))
    if all(parse_prompt(prompt) for prompt in prompts):
        features.append(RulesFeature())
    if settings.text_encoder:
        features.append(
            TextAdherenceFeature(load_embedder(settings.text_encoder, device=device), settings.text_encoder)
        )
    if settings.aesthetics:
        first = AestheticsFeature("aesthetics_ce", device=device)
        features += [first, AestheticsFeature("aesthetics_pq", first.score.model, device)]
    return features


def _length(player: Player, clip_seconds: float | None) -> tuple[int, float]:
    from diverse_cfg.trainer.setup import clip_frames

    frames = clip_frames(player.policy, clip_seconds)
    return frames, frames / player.policy.frame_rate
