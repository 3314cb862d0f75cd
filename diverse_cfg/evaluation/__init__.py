"""From systems to evidence: sweep → metrics with intervals → findings, figures, pages, listening test.

`report.evaluate` tells the story: `protocol` builds a `Sweep` from the YAML of `diverse-cfg evaluate`, and `systems`
says what is compared; `generations` samples the clips and `cache` keeps them; `features` computes what is expensive
once, `metrics` turns it into numbers, `results` holds them with their intervals. `signatures` and `figures` show
what they say, `report` writes the pages, and `listening` asks people.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Public name → module that defines it; imported on first use, since a table needs no models.
_PUBLIC = {
    "ClipSet": "diverse_cfg.evaluation.generations",
    "Estimate": "diverse_cfg.evaluation.results",
    "Results": "diverse_cfg.evaluation.results",
    "Sweep": "diverse_cfg.evaluation.sweep",
    "SweepConfig": "diverse_cfg.evaluation.protocol",
    "System": "diverse_cfg.evaluation.systems",
    "build_sweep": "diverse_cfg.evaluation.protocol",
    "expand_systems": "diverse_cfg.evaluation.systems",
}

__all__ = [
    "ClipSet",
    "Estimate",
    "Results",
    "Sweep",
    "SweepConfig",
    "System",
    "build_sweep",
    "expand_systems",
]

if TYPE_CHECKING:
    from diverse_cfg.evaluation.generations import ClipSet
    from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep
    from diverse_cfg.evaluation.results import Estimate, Results
    from diverse_cfg.evaluation.sweep import Sweep
    from diverse_cfg.evaluation.systems import System, expand_systems


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diverse_cfg.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
