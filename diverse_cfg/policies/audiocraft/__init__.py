"""AudioCraft's MusicGen in and out: checkpoints without the audiocraft package, live objects with it.

The policy that is trained is always transformers' class; AudioCraft is a format of what comes in and what goes out.
`folders` is the seam through which everything above reads AudioCraft checkpoints.
"""

from diverse_cfg.policies.audiocraft.folders import is_audiocraft, load_audiocraft, transformers_folder
from diverse_cfg.policies.audiocraft.importing import import_audiocraft
from diverse_cfg.policies.audiocraft.live import (
    from_audiocraft,
    is_live_audiocraft,
    to_audiocraft,
    without_null_rows,
)
from diverse_cfg.policies.audiocraft.writing import export_audiocraft

__all__ = [
    "export_audiocraft",
    "from_audiocraft",
    "import_audiocraft",
    "is_audiocraft",
    "is_live_audiocraft",
    "load_audiocraft",
    "to_audiocraft",
    "transformers_folder",
    "without_null_rows",
]
