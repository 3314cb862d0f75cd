"""The trainer: `CFGDiversityTrainer`."""

from diverse_cfg.trainer.trainer import CFGDiversityTrainer

__all__ = ["CFGDiversityTrainer"]
