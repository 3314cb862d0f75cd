"""What is written: a folder that plain transformers plays without guidance, and checkpoints that continue exactly."""

import os
from pathlib import Path
from typing import Any

from transformers import MusicgenForConditionalGeneration, PreTrainedTokenizerBase, ProcessorMixin

from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.provenance import Provenance, write_provenance


def write_companions(
    folder: str | os.PathLike,
    policy: MusicgenForConditionalGeneration,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    provenance: Provenance,
) -> None:
    """Put beside the weights what playing them needs: processor, generation settings, provenance.

    An adapter's folder needs the generation settings most: without them the base's guidance of 3 would come back.
    """
    processor.save_pretrained(folder)
    policy.generation_config.save_pretrained(folder)
    # A pickle has no place in a model folder; resuming does not read it.
    (Path(folder) / "training_args.bin").unlink(missing_ok=True)
    write_provenance(folder, provenance)


def student_provenance(
    args: CFGDiversityConfig,
    base_model: str | None,
    sampling: dict[str, Any],
    steps: int,
    clip_seconds: float,
) -> Provenance:
    """`diverse_cfg.json` of a model that this trainer made."""
    return Provenance(
        kind="student",
        base_model=args.teacher_model or base_model,
        guidance_scale=args.guidance_scale,
        diversity_coef=args.diversity_coef,
        sampling=sampling,
        training={
            "initial_model": base_model,
            "steps": steps,
            "learning_rate": args.learning_rate,
            "num_generations": args.num_generations,
            "generation_batch_size": args.generation_batch_size,
            "clip_seconds": clip_seconds,
            "divergence": args.divergence,
            "distillation_coef": args.distillation_coef,
            "negative_prompt": args.negative_prompt,
            "rollout_source": args.rollout_source,
            "prefix_baseline": args.prefix_baseline,
            "ema_decay": args.ema_decay,
            "seed": args.seed,
        },
    )
