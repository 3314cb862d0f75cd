"""Diversity-Rewarded CFG Distillation (arXiv 2410.06084) for MusicGen.

The package reads as one story: prompts → rollout → teacher → distillation loss + diversity reward → update →
merge → evaluate → publish. `functional/` holds the mathematics, the modules beside it the story, in order.

Names below are imported on first use, so that `import diverse_cfg` and `diverse-cfg --help` load neither
torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name → module that defines it.
_PUBLIC = {
    "CFGDiversityConfig": "diverse_cfg.config",
    "CFGDiversityTrainer": "diverse_cfg.trainer",
    "DiversityReward": "diverse_cfg.rewards",
    "FacetReward": "diverse_cfg.facets",
    "MusicSFTConfig": "diverse_cfg.config",
    "MusicSFTTrainer": "diverse_cfg.trainer",
    "RolloutWeights": "diverse_cfg.policies.sampler.weights",
    "export_audiocraft": "diverse_cfg.policies.audiocraft",
    "diverse_subset": "diverse_cfg.subset",
    "extend": "diverse_cfg.policies.sampler.extension",
    "fast_generate": "diverse_cfg.policies.sampler.rollout",
    "from_audiocraft": "diverse_cfg.policies.audiocraft",
    "hybrid_generate": "diverse_cfg.policies.sampler.extension",
    "import_audiocraft": "diverse_cfg.policies.audiocraft",
    "inspect_checkpoint": "diverse_cfg.merging",
    "load_audiocraft": "diverse_cfg.policies.audiocraft",
    "load_embedder": "diverse_cfg.embeddings",
    "load_policy": "diverse_cfg.policies.loading",
    "load_processor": "diverse_cfg.policies.loading",
    "load_prompts": "diverse_cfg.prompts",
    "load_slider": "diverse_cfg.merging",
    "load_take": "diverse_cfg.policies.takes",
    "merge_checkpoints": "diverse_cfg.merging",
    "nano_path": "diverse_cfg.assets",
    "to_audiocraft": "diverse_cfg.policies.audiocraft",
    "without_null_rows": "diverse_cfg.policies.audiocraft",
}

__all__ = [
    "CFGDiversityConfig",
    "CFGDiversityTrainer",
    "DiversityReward",
    "FacetReward",
    "MusicSFTConfig",
    "MusicSFTTrainer",
    "RolloutWeights",
    "__version__",
    "diverse_subset",
    "export_audiocraft",
    "extend",
    "fast_generate",
    "from_audiocraft",
    "hybrid_generate",
    "import_audiocraft",
    "inspect_checkpoint",
    "load_audiocraft",
    "load_embedder",
    "load_policy",
    "load_processor",
    "load_prompts",
    "load_slider",
    "load_take",
    "merge_checkpoints",
    "nano_path",
    "to_audiocraft",
    "without_null_rows",
]

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from diverse_cfg.assets import nano_path
    from diverse_cfg.config import CFGDiversityConfig, MusicSFTConfig
    from diverse_cfg.embeddings import load_embedder
    from diverse_cfg.facets import FacetReward
    from diverse_cfg.merging import inspect_checkpoint, load_slider, merge_checkpoints
    from diverse_cfg.policies.audiocraft import (
        export_audiocraft,
        from_audiocraft,
        import_audiocraft,
        load_audiocraft,
        to_audiocraft,
        without_null_rows,
    )
    from diverse_cfg.policies.loading import load_policy, load_processor
    from diverse_cfg.policies.sampler.extension import extend, hybrid_generate
    from diverse_cfg.policies.sampler.rollout import fast_generate
    from diverse_cfg.policies.sampler.weights import RolloutWeights
    from diverse_cfg.policies.takes import load_take
    from diverse_cfg.prompts import load_prompts
    from diverse_cfg.rewards import DiversityReward
    from diverse_cfg.subset import diverse_subset
    from diverse_cfg.trainer import CFGDiversityTrainer, MusicSFTTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diverse_cfg' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
