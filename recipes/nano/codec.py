"""The codec of the nano world: 16 kHz audio ↔ 25 frames/s × 4 codebooks × 512 codes, inside a plain `EncodecModel`.

Training EnCodec end to end from scratch on a CPU sticks at the average spectrum. So it is taken apart:

1. quantizer: a fixed spectral feature of each 40 ms frame → PCA → residual k-means = the codebooks;
2. vocoder: EnCodec's decoder learns waveforms from the codes (spectral losses; phase is not coded);
3. encoder: EnCodec's encoder learns to predict the features from the waveform, so that `encode` finds the codes.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from data import CLIP_SAMPLES, Clips
from render import SAMPLE_RATE
from torch import nn
from tqdm import tqdm
from training import Schedule, save_atomically, train
from transformers import EncodecConfig, EncodecModel

HOP = 640
NUM_CODEBOOKS, CODEBOOK_SIZE, DIM = 4, 512, 64
FLOOR = 1e-4  # of full scale: −80 dB
CROP = 20  # frames of a vocoder or encoder training crop (0.8 s)


def codec_config() -> EncodecConfig:
    return EncodecConfig(
        target_bandwidths=[NUM_CODEBOOKS * math.log2(CODEBOOK_SIZE) * SAMPLE_RATE / HOP / 1000],
        sampling_rate=SAMPLE_RATE,
        audio_channels=1,
        normalize=False,
        num_filters=20,
        upsampling_ratios=[4, 4, 5, 8],
        num_lstm_layers=1,
        use_causal_conv=False,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=DIM,
        hidden_size=DIM,
    )


def mel_filters(n_fft: int, bands: int, low: float = 50.0, high: float = 7800.0) -> torch.Tensor:
    """Triangular HTK-mel filters with unit peaks, [n_fft/2 + 1, bands]."""
    mel = torch.linspace(2595 * math.log10(1 + low / 700), 2595 * math.log10(1 + high / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)[:, None]
    up = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(up, down).clamp_min(0)
    # A band narrower than the bins would be empty: it takes its nearest bin.
    empty = filters.sum(0) == 0
    filters[(bins - edges[1:-1]).abs().argmin(0)[empty], empty.nonzero().flatten()] = 1
    return filters


class LogMel(nn.Module):
    """Waveform [B, L] → log-mel magnitudes [B, frames, bands] in nepers; magnitude 1 is a full-scale sine's ×½."""

    def __init__(self, n_fft: int, hop: int, bands: int):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("filters", mel_filters(n_fft, bands), persistent=False)

    def magnitude(self, waveform: torch.Tensor) -> torch.Tensor:
        """Frames are centred at hop/2, 3·hop/2, …; the signal is continued by zeros."""
        padded = nn.functional.pad(waveform, ((self.n_fft - self.hop) // 2,) * 2)
        spectrum = torch.stft(
            padded, self.n_fft, self.hop, window=self.window, center=False, return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        magnitude = (power + 1e-12).sqrt() / self.window.sum()
        return magnitude.transpose(1, 2) @ self.filters

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        return (self.magnitude(waveform) + FLOOR).log()


class FrameFeatures(nn.Module):
    """Waveform [B, L] → [B, L/640, 448]: two spectra of 160 bands (pitch) and four of 32 bands (onsets) per frame."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = LogMel(2048, HOP // 2, 160), LogMel(512, HOP // 4, 32)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        frames = waveform.shape[-1] // HOP
        parts = [layer(waveform).reshape(len(waveform), frames, -1) for layer in (self.fine, self.coarse)]
        return torch.cat(parts, -1)


def fit_quantizer(clips: Clips, path: Path, seed: int, sample: int = 4000) -> dict[str, torch.Tensor]:
    """PCA of the frame features and residual k-means: `mean` [448], `basis` [448, 64], `codebooks` [4, 512, 64]."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    features = FrameFeatures()
    chosen = rng.choice(len(clips), min(sample, len(clips)), replace=False)
    with torch.inference_mode():
        frames = torch.cat(
            [features(clips.waveforms(part)).flatten(0, 1) for part in np.array_split(chosen, 40)]
        )
    mean = frames.mean(0)
    values, vectors = torch.linalg.eigh((frames - mean).double().T @ (frames - mean).double() / len(frames))
    basis = (vectors[:, -DIM:].flip(1) / values[-DIM:].sum().div(DIM).sqrt()).float()
    latent = (frames - mean) @ basis
    tqdm.write(
        f"quantizer: {len(frames)} frames, PCA keeps {values[-DIM:].sum() / values.sum():.4f} of the variance"
    )
    total, residual, codebooks = latent.pow(2).sum(), latent.numpy(), []
    for stage in tqdm(range(NUM_CODEBOOKS), desc="k-means", unit="codebook"):
        kmeans = KMeans(CODEBOOK_SIZE, n_init=1, max_iter=60, random_state=seed + stage).fit(residual)
        residual = residual - kmeans.cluster_centers_[kmeans.labels_]
        codebooks.append(torch.from_numpy(kmeans.cluster_centers_.astype(np.float32)))
        tqdm.write(
            f"quantizer: residual variance after codebook {stage}: {(residual**2).sum() / total.item():.4f}"
        )
    fitted = {"mean": mean, "basis": basis, "codebooks": torch.stack(codebooks)}
    save_atomically(fitted, path)
    return fitted


def build_codec(quantizer: dict[str, torch.Tensor]) -> EncodecModel:
    """An `EncodecModel` with the fitted codebooks; encoder and decoder still random."""
    codec = EncodecModel(codec_config())
    for layer, codebook in zip(codec.quantizer.layers, quantizer["codebooks"], strict=True):
        layer.codebook.embed.copy_(codebook)
        layer.codebook.embed_avg.copy_(codebook)
        layer.codebook.cluster_size.fill_(1.0)
    return codec


def encode_features(latent: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Residual quantisation of `latent` [N, 64] → codes [N, 4]."""
    residual, codes = latent, []
    for codebook in codebooks:
        index = (codebook.pow(2).sum(1) - 2 * residual @ codebook.T).argmin(1)
        residual = residual - codebook[index]
        codes.append(index)
    return torch.stack(codes, 1)


def write_codes(clips: Clips, quantizer: dict[str, torch.Tensor], path: Path) -> np.ndarray:
    """Codes of every clip, uint16 [clips, 4, 75]."""
    if path.is_file():
        return np.load(path)
    features = FrameFeatures()
    out = np.empty((len(clips), NUM_CODEBOOKS, CLIP_SAMPLES // HOP), dtype=np.uint16)
    with torch.inference_mode():
        for first in tqdm(range(0, len(clips), 50), desc=f"codes {path.stem}", unit_scale=50, unit="clip"):
            index = range(first, min(first + 50, len(clips)))
            latent = (features(clips.waveforms(index)) - quantizer["mean"]) @ quantizer["basis"]
            codes = encode_features(latent.flatten(0, 1), quantizer["codebooks"])
            out[index.start : index.stop] = codes.view(len(index), -1, NUM_CODEBOOKS).transpose(1, 2).numpy()
    partial = path.with_suffix(".partial.npy")
    np.save(partial, out)
    partial.replace(path)
    return out


@torch.inference_mode()
def decode_clips(codec: EncodecModel, codes: np.ndarray, indices: np.ndarray) -> dict[int, np.ndarray]:
    """Clip → its samples [L] when played from its codes, int16."""
    played = {}
    for part in tqdm(np.array_split(indices, max(1, len(indices) // 32)), desc="play codes", unit="batch"):
        audio = codec.decode(torch.from_numpy(codes[part].astype(np.int64))[None], [None])[0][:, 0]
        samples = (audio.clamp(-1, 1) * 32767).round().short().numpy()
        played.update(zip(part.tolist(), samples, strict=True))
    return played


@torch.no_grad()
def initialise_by_data(decoder: nn.Module, latent: torch.Tensor) -> None:
    """Rescale each convolution so that its output has a set spread on `latent`; biases zero.

    With the default initialisation the loss starts at 49 and the first thousand steps are lost on scales.
    """
    convolutions = [m for m in decoder.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    for index, layer in enumerate(convolutions):
        residual_end = layer.kernel_size == (1,) and layer.in_channels < layer.out_channels
        target = 0.05 if index == len(convolutions) - 1 else 0.3 if residual_end else 1.0
        seen: list[float] = []
        hook = layer.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.std().item()))
        layer.bias.zero_()
        decoder(latent)
        hook.remove()
        layer.parametrizations.weight.original0.mul_(target / max(seen[0], 1e-6))


class SpectralLoss(nn.Module):
    """Log-mel L1 + spectral convergence at three resolutions."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ModuleList([LogMel(2048, 512, 160), LogMel(1024, 256, 80), LogMel(512, 128, 64)])

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = output.new_zeros(())
        for scale in self.scales:
            mine, theirs = scale.magnitude(output), scale.magnitude(target)
            loss = loss + ((mine + FLOOR).log() - (theirs + FLOOR).log()).abs().mean()
            loss = loss + 0.5 * (mine - theirs).norm() / theirs.norm().clamp_min(1e-3)
        return loss / len(self.scales)


def mel_error_db(output: torch.Tensor, target: torch.Tensor) -> float:
    """Mean |difference| in dB of 80-band log-mel spectra (FFT 1024, hop 256, floor −80 dB of full scale)."""
    mel = LogMel(1024, 256, 80)
    return (20 / math.log(10) * (mel(output) - mel(target)).abs().mean()).item()


def train_vocoder(
    codec: EncodecModel,
    clips: Clips,
    codes: np.ndarray,
    held_out: Clips,
    held_codes: np.ndarray,
    schedule: Schedule,
    folder: Path,
    seed: int,
    batch: int = 6,
) -> None:
    """EnCodec's decoder as a vocoder: random crops of 0.8 s, codes in, waveform out."""
    decoder, loss_of = codec.decoder, SpectralLoss()
    embed = torch.stack([layer.codebook.embed for layer in codec.quantizer.layers])

    def latent_of(codes: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(codes.astype(np.int64))
        return sum(nn.functional.embedding(index[:, k], embed[k]) for k in range(NUM_CODEBOOKS)).transpose(
            1, 2
        )

    def crops(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = rng.integers(len(clips), size=count)
        first = rng.integers(codes.shape[2] - CROP + 1, size=count)
        part = np.stack([codes[i, :, f : f + CROP] for i, f in zip(index, first, strict=True)])
        return latent_of(part), clips.waveforms(index, first * HOP, CROP * HOP)

    if not (folder / "vocoder.pt").is_file():
        torch.manual_seed(seed)
        initialise_by_data(decoder, crops(np.random.default_rng(seed), 16)[0])
    # The gain of the output layer stays: it is small, and steps of Adam's size would change it by half each time.
    decoder.layers[-1].conv.parametrizations.weight.original0.requires_grad_(False)

    def loss_of_step(step: int) -> torch.Tensor:
        latent, target = crops(np.random.default_rng([seed, 1, step]), batch)
        return loss_of(decoder(latent)[:, 0], target)

    index = np.linspace(0, len(held_out) - 1, 64).astype(int)
    truth, latent = held_out.waveforms(index), latent_of(held_codes[index])

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        output = torch.cat([decoder(part)[:, 0] for part in latent.split(16)])
        return {"validation_loss": loss_of(output, truth).item(), "mel_error_db": mel_error_db(output, truth)}

    train("vocoder", decoder, loss_of_step, evaluate, schedule, folder, betas=(0.9, 0.99), weight_decay=0.0)


def train_encoder(
    codec: EncodecModel,
    clips: Clips,
    held_out: Clips,
    held_codes: np.ndarray,
    quantizer: dict[str, torch.Tensor],
    schedule: Schedule,
    folder: Path,
    seed: int,
    batch: int = 6,
) -> None:
    """EnCodec's encoder by regression onto the features, so that its nearest codes are those of the features."""
    encoder, features = codec.encoder, FrameFeatures()

    def loss_of_step(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 2, step])
        index = rng.integers(len(clips), size=batch)
        first = rng.integers(CLIP_SAMPLES // HOP - CROP + 1, size=batch)
        waveform = clips.waveforms(index, first * HOP, CROP * HOP)
        with torch.no_grad():
            target = (features(waveform) - quantizer["mean"]) @ quantizer["basis"]
        return (encoder(waveform[:, None]).transpose(1, 2) - target).square().mean()

    index = np.linspace(0, len(held_out) - 1, 64).astype(int)
    truth = held_out.waveforms(index)

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        found = codec.encode(truth[:, None]).audio_codes[0].numpy()
        target = (features(truth) - quantizer["mean"]) @ quantizer["basis"]
        error = (encoder(truth[:, None]).transpose(1, 2) - target).square().mean().item()
        same = (found == held_codes[index]).mean(axis=(0, 2))
        return {"validation_loss": error, **{f"same_code_{k}": float(s) for k, s in enumerate(same)}}

    if not (folder / "encoder.pt").is_file():
        torch.manual_seed(seed + 1)
        initialise_encoder(encoder, clips.waveforms(range(16), 0, CROP * HOP)[:, None])
    train("encoder", encoder, loss_of_step, evaluate, schedule, folder, betas=(0.9, 0.99), weight_decay=0.0)


def initialise_encoder(encoder: nn.Module, waveform: torch.Tensor) -> None:
    """As the decoder's, with unit spread at the output (the features' own)."""
    initialise_by_data(encoder, waveform)
    last = [m for m in encoder.modules() if isinstance(m, nn.Conv1d)][-1]
    with torch.no_grad():
        last.parametrizations.weight.original0.mul_(20.0)
