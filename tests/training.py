"""Small trainers for the tests: the tiny MusicGen, an encoder that reads codes, eight clips a step."""

from __future__ import annotations

import torch
from torch import Tensor

from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor


class CodeEmbedder:
    """Mean of a fixed random vector per code; no audio needed."""

    name = "codes"
    reads = "codes"
    sampling_rate = 3200

    def __init__(self, num_codebooks: int = 4, codes: int = 16):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(num_codebooks, codes, 6, generator=generator)

    def embed(self, inputs: Tensor, sampling_rate: int | None = None) -> Tensor:
        rows = [self.table[k][inputs[:, k]] for k in range(inputs.shape[1])]
        return torch.stack(rows).mean(dim=(0, 2))


class WaveEmbedder:
    """Loudness of eight parts of the clip."""

    name = "waves"
    reads = "waveforms"
    sampling_rate = 3200

    def embed(self, inputs: Tensor, sampling_rate: int | None = None) -> Tensor:
        assert inputs.ndim in (2, 3) and sampling_rate == 3200
        parts = inputs.flatten(1).unfold(1, inputs[0].numel() // 8, inputs[0].numel() // 8)
        return parts.square().mean(dim=2).sqrt() + 1e-3


def tiny_args(folder, **settings) -> CFGDiversityConfig:
    """Two prompts of four clips a step, in float32, nothing reported."""
    defaults = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "diversity_coef": 5.0,
        "clip_seconds": 0.2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "alarms": False,
        "audio_samples": 0,
    }
    return CFGDiversityConfig(output_dir=str(folder), **{**defaults, **settings})


def tiny_trainer(
    folder, model=None, reward="codes", peft_config=None, prompts=PROMPTS, **settings
) -> CFGDiversityTrainer:
    """A trainer over `tiny_musicgen` (or `model`); `reward` "codes", or reward functions."""
    model = tiny_musicgen() if model is None else model
    channels = 4 if isinstance(model, str) else model.config.decoder.num_codebooks
    return CFGDiversityTrainer(
        model,
        DiversityReward(CodeEmbedder(channels)) if reward == "codes" else reward,
        tiny_args(folder, **settings),
        train_dataset=list(prompts),
        processing_class=None if isinstance(model, str) else tiny_processor(),
        peft_config=peft_config,
    )


def trained(trainer) -> dict[str, Tensor]:
    """The trained parameters by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def losses(trainer) -> list[float]:
    """Logged loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
