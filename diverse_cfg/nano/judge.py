"""The attribute judge of the nano world: what a clip is, heard by a small network that no training reward knows.

It is trained on rendered clips of known notes (`recipes/nano/judges.py`), never on generations, and shares neither
features nor weights with the embedders.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diverse_cfg.embeddings.audio import LogMel, resample, to_mono
from diverse_cfg.nano.attributes import ATTRIBUTES
from diverse_cfg.nano.rules import scores_of
from diverse_cfg.reading import read_json, reading

CONFIG_NAME = "judge.json"
LOWEST_PITCH, PITCHES = 36, 72  # semitone bands from C2 (65 Hz) on


@dataclass
class JudgeConfig:
    sampling_rate: int = 16_000
    width: int = 24
    attributes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(ATTRIBUTES))


class AttributeJudge(nn.Module):
    """Waveforms → logits per attribute. Timbre, tempo and register from a log-mel CNN, key from a semitone spectrum."""

    def __init__(self, config: JudgeConfig | None = None):
        super().__init__()
        self.config = config or JudgeConfig()
        width = self.config.width
        self.log_mel = LogMel(self.config.sampling_rate, 1024, 160, 64)
        self.register_buffer(
            "semitones", _semitone_filters(self.config.sampling_rate, 8192), persistent=False
        )
        channels = (1, width, width, 2 * width, 2 * width)
        blocks = []
        for first, second in pairwise(channels):
            blocks += [nn.Conv2d(first, second, 3, (2, 2), 1), nn.BatchNorm2d(second), nn.ReLU()]
        self.mel_net = nn.Sequential(*blocks)
        features = 2 * width * 4  # frequency quarters are kept apart
        self.dropout = nn.Dropout(0.2)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(2 * features, 64), nn.ReLU(), nn.Linear(64, len(classes)))
                for name, classes in self.config.attributes.items()
                if name != "key"
            }
        )
        self.pitch_net = nn.Sequential(nn.Linear(2 * (PITCHES + 12), 96), nn.ReLU(), nn.Dropout(0.2))
        self.key_head = nn.Linear(96, len(self.config.attributes["key"]))

    def forward(self, waveforms: Tensor) -> dict[str, Tensor]:
        """Logits {attribute: [B, classes]} of waveforms [B, L] at the judge's rate."""
        hidden = self.mel_net((self.log_mel(waveforms) / 4.6 + 1)[:, None])  # [B, C, 4, frames]
        hidden = hidden.flatten(1, 2)
        hidden = self.dropout(torch.cat([hidden.mean(2), hidden.amax(2)], 1))
        logits = {name: head(hidden) for name, head in self.heads.items()}
        logits["key"] = self.key_head(self.pitch_net(self.pitch_features(waveforms)))
        return logits

    def pitch_features(self, waveforms: Tensor) -> Tensor:
        """Time-averaged semitone spectrum and its fold to twelve classes, linear and compressed [B, 2·84]."""
        window = torch.hann_window(4096, device=waveforms.device)
        spectrum = torch.stft(
            waveforms, 8192, 800, 4096, window=window, center=True, pad_mode="constant", return_complex=True
        )
        semitones = spectrum.abs().transpose(1, 2) @ self.semitones  # [B, frames, pitches]
        semitones = semitones / semitones.amax((1, 2), keepdim=True).clamp_min(1e-6)
        views = []
        for view in (semitones.mean(1), semitones.sqrt().mean(1)):
            folded = view.unflatten(1, (-1, 12)).sum(1)
            views += [
                view / view.sum(1, keepdim=True).clamp_min(1e-6) * 8,
                folded / folded.sum(1, keepdim=True).clamp_min(1e-6) * 4,
            ]
        return torch.cat(views, 1)

    @torch.no_grad()
    def classify(self, waveforms: Tensor, sampling_rate: int, batch_size: int = 64) -> dict[str, np.ndarray]:
        """Most likely class index per attribute {attribute: [B]} of waveforms [B, L] or [B, 2, L]."""
        self.eval()
        audio = resample(to_mono(waveforms), sampling_rate, self.config.sampling_rate)
        parts = [self(part.to(self.semitones.device)) for part in audio.split(batch_size)]
        return {name: torch.cat([p[name].argmax(1).cpu() for p in parts]).numpy() for name in parts[0]}

    def adherence(self, waveforms: Tensor, sampling_rate: int, prompts: list[str]) -> dict[str, np.ndarray]:
        """Whether each clip is what its prompt names.

        Returns:
            Per attribute 1.0, 0.0 or NaN (the prompt does not name it), and `mean` over the named ones; arrays [B].
        """
        names = {name: list(classes) for name, classes in self.config.attributes.items()}
        return scores_of(self.classify(waveforms, sampling_rate), names, prompts)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `judge.json` and `model.safetensors` (float16) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        half = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file(
            {k: v.contiguous().cpu() for k, v in half.items()}, folder / "model.safetensors", {"format": "pt"}
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AttributeJudge:
        """Load a folder written by `save_pretrained`.

        Raises:
            FileNotFoundError: the folder holds no judge.
        """
        folder = Path(folder)
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}: it is not an attribute judge")
        values = read_json(folder / CONFIG_NAME)
        with reading(folder / CONFIG_NAME):
            values["attributes"] = {k: tuple(v) for k, v in values["attributes"].items()}
            judge = cls(JudgeConfig(**values))
        with reading(folder / "model.safetensors"):
            weights = load_file(folder / "model.safetensors")
            judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        return judge.eval()


def _semitone_filters(sampling_rate: int, n_fft: int) -> Tensor:
    """Triangular filters one semitone wide around each pitch [n_fft/2 + 1, 72]."""
    hertz = torch.arange(n_fft // 2 + 1) * sampling_rate / n_fft
    midi = 69 + 12 * torch.log2(hertz.clamp_min(1.0) / 440.0)
    return (1 - (midi[:, None] - (LOWEST_PITCH + torch.arange(PITCHES))).abs()).clamp_min(0)
