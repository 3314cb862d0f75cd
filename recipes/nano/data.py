"""Clips of the rendered splits as arrays, with the crops and captions that training needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from captions import CLIP_SECONDS
from render import CLIP_STARTS, SAMPLE_RATE

CLIP_SAMPLES = round(CLIP_SECONDS * SAMPLE_RATE)


class Clips:
    """All clips of a split: clip i is half `i % 2` of recording `i // 2`.

    Attributes:
        attributes: one dict per clip. songs: the song of each clip.
    """

    def __init__(self, folder: Path):
        if not (folder / "recordings.jsonl").is_file():
            raise FileNotFoundError(f"no rendered recordings in {folder}: run the stage `render` first")
        self.audio = np.load(folder / "audio.npy", mmap_mode="r")
        rows = [json.loads(line) for line in (folder / "recordings.jsonl").open()]
        self.attributes = [clip for row in rows for clip in row["clips"]]
        self.songs = [row["song"] for row in rows for _ in CLIP_STARTS]
        self.notes = [row["notes"] for row in rows]

    def __len__(self) -> int:
        return len(self.attributes)

    def waveforms(self, indices, start: int = 0, length: int = CLIP_SAMPLES) -> torch.Tensor:
        """Samples `[start, start + length)` of the clips `indices` → float32 [B, length] in [−1, 1]."""
        starts = np.array([round(s * SAMPLE_RATE) for s in CLIP_STARTS])
        out = np.empty((len(indices), length), dtype=np.float32)
        begin = np.broadcast_to(start, (len(indices),))
        for row, index in enumerate(indices):
            first = starts[index % len(CLIP_STARTS)] + begin[row]
            out[row] = self.audio[index // len(CLIP_STARTS), first : first + length]
        return torch.from_numpy(out).div_(32767)
