"""The trainers: `CFGDiversityTrainer`, and `MusicSFTTrainer` for a user's own recordings."""

from diverse_cfg.trainer.finetuning import MusicSFTTrainer
from diverse_cfg.trainer.trainer import CFGDiversityTrainer

__all__ = ["CFGDiversityTrainer", "MusicSFTTrainer"]
