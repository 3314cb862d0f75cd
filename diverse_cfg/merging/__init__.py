"""Checkpoints in, interpolated checkpoint out; a slider between experts; and what a checkpoint is.

`merge` writes folders, `slider` moves a loaded model, `inspection` reports; all three read checkpoints
through `checkpoints` (one of them) and `experts` (several, and the interpolation itself).
"""

from diverse_cfg.merging.inspection import format_report, inspect_checkpoint
from diverse_cfg.merging.merge import merge_checkpoints, merge_sweep, read_recipe
from diverse_cfg.merging.slider import MergeSlider, load_slider
from diverse_cfg.merging.weights import parse_sweep, resolve_weights

__all__ = [
    "MergeSlider",
    "format_report",
    "inspect_checkpoint",
    "load_slider",
    "merge_checkpoints",
    "merge_sweep",
    "parse_sweep",
    "read_recipe",
    "resolve_weights",
]
