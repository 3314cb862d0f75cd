"""Stand-ins for the encoders and the judge of a real evaluation, a few lines each, and audio that is broken
on purpose."""

import json
import math

import numpy as np
import torch

from diverse_cfg.evaluation.cache import Cache
from diverse_cfg.evaluation.features import EmbeddingFeature, ValidityFeature
from diverse_cfg.evaluation.generations import ClipSet
from diverse_cfg.evaluation.sweep import Sweep
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor


class CodesEncoder:
    """Histogram of codebook 0."""

    name, sampling_rate, reads = "histogram", 3200, "codes"

    def embed(self, inputs, sampling_rate=None):
        return torch.stack([torch.bincount(clip[0], minlength=16).float() for clip in inputs])


class WaveEncoder:
    """Energy in sixteen bands; silence has none, so it has no direction."""

    name, sampling_rate, reads = "bands", 3200, "waveforms"

    def embed(self, inputs, sampling_rate=None):
        power = torch.fft.rfft(inputs).abs().square()
        return power[:, : power.shape[1] // 16 * 16].unflatten(1, (16, -1)).mean(dim=2)


class CountingJudge:
    """ "Right" when the first samples are positive; counts its calls."""

    def __init__(self):
        self.calls = 0

    def adherence(self, waveforms, sampling_rate, prompts):
        self.calls += 1
        right = (waveforms[:, :50].mean(dim=1) > 0).double().numpy()
        named = np.array(["piano" in prompt for prompt in prompts])
        columns = {
            name: np.where(named, right, np.nan) for name in ("instrument", "tempo", "register", "key")
        }
        return {**columns, "mean": right}


def save_sibling(folder, seed=1):
    """A checkpoint that differs from `save_tiny`'s in its decoder alone, as a student does from its base."""
    model = tiny_musicgen()
    model.decoder.load_state_dict(tiny_musicgen(seed=seed).decoder.state_dict())
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def encoder_folder(path, **content):
    """A folder that an encoder's content hash can be taken of."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "encoder.json").write_text(json.dumps(content))
    return str(path)


def small_sweep(
    folder, *, prompts=PROMPTS, num_generations=3, seeds=(0,), rollout_backend="fast", features=(), **kwargs
):
    """A protocol of a few short clips with both encoders; everything below `folder`."""
    encoders = [
        EmbeddingFeature("reward", CodesEncoder(), encoder_folder(folder / "codes")),
        EmbeddingFeature("heldout", WaveEncoder(), encoder_folder(folder / "waves")),
    ]
    clips = ClipSet(tuple(prompts), num_generations, 12, tuple(seeds), rollout_backend)
    return Sweep(clips, [ValidityFeature(), *encoders, *features], Cache(folder / "cache"), **kwargs)


def broken_audio(kind, num_clips, num_samples, seed=0):
    """Clips [N, L] at 3200 Hz that no one should hear: "silence", "noise" (white, all different), "brown" noise,
    "clipping", a constant "offset", or "hum" at 20 Hz."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_clips, num_samples, generator=generator)
    time = torch.arange(num_samples).expand(num_clips, -1) / 3200
    if kind == "brown":
        spectrum = torch.fft.rfft(noise)
        noise = torch.fft.irfft(spectrum / torch.arange(1, spectrum.shape[1] + 1), n=num_samples)
        return 0.1 * noise / noise.square().mean(dim=1, keepdim=True).sqrt()
    tones = torch.sin(2 * math.pi * (200 + 40 * torch.arange(num_clips)[:, None]) * time)
    return {
        "silence": torch.zeros(num_clips, num_samples),
        "noise": 0.2 * noise,
        "clipping": (20 * tones).clamp(-1, 1),
        "offset": torch.full((num_clips, num_samples), 0.1),
        "hum": 0.1 * torch.sin(2 * math.pi * 20 * time),
    }[kind]
