"""Embedders: resampling, CLAP's features, the contrastive encoder and its loss."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.signal import resample_poly

from diverse_cfg.embeddings import load_embedder
from diverse_cfg.embeddings.audio import resample, to_mono
from diverse_cfg.embeddings.contrastive import (
    ContrastiveConfig,
    ContrastiveEmbedder,
    ContrastiveEncoder,
    retrieval_at_1,
    semi_hard_triplet_loss,
    train_contrastive,
)
from diverse_cfg.embeddings.sentence import SentenceTransformerEmbedder

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "dim": 8, "dropout": 0.0}


def tones(frequencies, rate, seconds=1.0):
    time = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    return torch.stack([torch.sin(2 * torch.pi * f * time) for f in frequencies]).float()


# ---- audio ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [(16_000, 48_000), (48_000, 16_000), (32_000, 44_100)])
def test_resampling_keeps_tones_in_place(source, target):
    """Catches a shifted or scaled kernel: a tone comes out as the same tone, sample by sample."""
    got = resample(tones([440.0, 1000.0], source), source, target)
    want = tones([440.0, 1000.0], target)
    assert got.shape == want.shape
    inner = slice(target // 10, -target // 10)
    assert (got[:, inner] - want[:, inner]).abs().max() < 2e-3


def test_resampling_removes_what_would_alias():
    """Catches a missing low-pass: 11 kHz cannot be in 16 kHz audio."""
    out = resample(tones([11_000.0], 48_000), 48_000, 16_000)
    assert out[:, 1600:-1600].abs().max() < 2e-3


def test_resampling_agrees_with_scipy_on_music_band_noise():
    noise = resample_poly(np.random.default_rng(0).standard_normal(4000), 8, 1).astype(np.float32)[None]
    got = resample(torch.from_numpy(noise), 32_000, 16_000)[0].numpy()
    want = resample_poly(noise[0], 1, 2)
    inner = slice(1000, -1000)
    assert np.abs(got - want)[inner].max() < 0.01 * np.abs(want).max()


def test_mono_is_the_mean_of_channels_and_other_shapes_are_refused():
    assert torch.equal(to_mono(torch.tensor([[[1.0, 3.0], [3.0, 5.0]]])), torch.tensor([[2.0, 4.0]]))
    with pytest.raises(ValueError, match=r"\[B, L\]"):
        to_mono(torch.zeros(5))


# ---- CLAP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory):
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    from tests.tiny import tiny_tokenizer

    folder = tmp_path_factory.mktemp("clap")
    config = ClapConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                     "vocab_size": 200, "projection_dim": 8, "max_position_embeddings": 80, "pad_token_id": 0},
        audio_config={"patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 16,
                      "spec_size": 256, "window_size": 8, "projection_dim": 8, "enable_fusion": False,
                      "num_mel_bins": 64},
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    ClapModel(config).save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_clap_features_equal_the_extractor_of_transformers(clap_folder):
    """Catches another window, filter bank or scale; also that short clips are repeated, as CLAP was trained."""
    from transformers import ClapFeatureExtractor

    embedder = load_embedder(clap_folder, device="cpu")
    audio = tones([300.0], 48_000, 3.0)[0] * 0.3 + 0.01 * torch.randn(
        144_000, generator=torch.Generator().manual_seed(0)
    )
    want = ClapFeatureExtractor.from_pretrained(clap_folder)(
        audio.numpy(), sampling_rate=48_000, return_tensors="pt", truncation="rand_trunc", padding="repeatpad"
    )["input_features"]
    repeated = torch.nn.functional.pad(audio.repeat(3), (0, 48_000))[None]
    got = embedder.log_mel(repeated)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-2
    assert (got - want).abs().mean() < 1e-4


def test_clap_is_deterministic_on_long_clips_and_resamples(clap_folder):
    """Catches the random crop of clips over ten seconds, and audio taken at the wrong rate."""
    embedder = load_embedder(clap_folder, device="cpu")
    long = torch.randn(2, 16_000 * 12, generator=torch.Generator().manual_seed(1)) * 0.1
    first, second = embedder.embed(long, 16_000), embedder.embed(long, 16_000)
    assert torch.equal(first, second)
    stereo = long[:, None].repeat(1, 2, 1)
    assert torch.allclose(embedder.embed(stereo, 16_000), first, atol=1e-5)
    assert embedder.embed_text(["a calm piano song"]).shape == (1, 8)


def test_missing_embedders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_embedder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"encoder\.json"):
        ContrastiveEmbedder.from_pretrained(tmp_path)


def test_damaged_embedders_are_named(clap_folder, tmp_path):
    """Catches weights that random numbers complete, and tracebacks of parsers."""
    clap, ours = Path(shutil.copytree(clap_folder, tmp_path / "clap")), tmp_path / "ours"
    weights = load_file(clap / "model.safetensors")
    del weights["audio_projection.linear2.weight"]
    save_file(weights, clap / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"clap lacks 1 tensor\(s\).*audio_projection\.linear2\.weight.*again"
    ):
        load_embedder(clap, device="cpu")
    encoder = ContrastiveEncoder(ContrastiveConfig(bands=16, **SMALL))
    ContrastiveEmbedder(encoder, device="cpu").save_pretrained(ours)
    for content in ("{", "[]", '{"bands": "many"}'):
        config = next(ours.rglob("encoder.json"))
        kept = config.read_text()
        config.write_text(content)
        with pytest.raises(ValueError, match=r"encoder\.json.*again$"):
            load_embedder(ours, device="cpu")
        config.write_text(kept)
    stored = next(ours.rglob("model.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*again$"):
        load_embedder(ours, device="cpu")


# ---- contrastive ---------------------------------------------------------------------------------


def slow_triplet(first, second, margin):
    """NumPy double loop over anchors."""
    vectors = np.concatenate([first, second]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    count = len(first)
    total = 0.0
    for anchor in range(2 * count):
        partner = (anchor + count) % (2 * count)
        positive = 1 - vectors[anchor] @ vectors[partner]
        others = [1 - vectors[anchor] @ vectors[j] for j in range(2 * count) if j % count != anchor % count]
        farther = [d for d in others if d > positive]
        total += max(0.0, positive - (min(farther) if farther else max(others)) + margin)
    return total / (2 * count)


def test_triplet_loss_equals_a_slow_loop():
    """Catches a negative that is the anchor's own partner, or the hardest instead of the semi-hard one."""
    generator = torch.Generator().manual_seed(0)
    for margin in (0.1, 0.5):
        first, second = torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)
        got = semi_hard_triplet_loss(first, second, margin).item()
        assert got == pytest.approx(slow_triplet(first.numpy(), second.numpy(), margin), abs=1e-5)


def test_contrastive_encoder_learns_which_chunks_belong_together(tmp_path):
    """Catches a loss or encoder that learns nothing; saving and loading keeps the embeddings (to half precision)."""
    config = ContrastiveConfig(reads="codes", num_codebooks=2, codebook_size=12, patch=2, **SMALL)

    def draw(batch, generator):
        kind = torch.randint(0, 6, (batch, 1, 1), generator=generator)
        return tuple(2 * kind + torch.randint(0, 2, (batch, 2, 8), generator=generator) for _ in range(2))

    embedder = train_contrastive(config, draw, steps=80, batch=16, learning_rate=3e-3, seed=0)
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randint(0, 2, (6, 2, 8), generator=generator) for _ in range(2)]
    kinds = 2 * torch.arange(6)[:, None, None]
    assert retrieval_at_1(embedder, kinds + noise[0], kinds + noise[1]) == 1.0

    embedder.save_pretrained(tmp_path / "encoder")
    loaded = load_embedder(tmp_path / "encoder", device="cpu")
    assert loaded.reads == "codes"
    assert torch.allclose(loaded.embed(kinds + noise[0]), embedder.embed(kinds + noise[0]), atol=2e-2)


def test_audio_encoder_is_a_sentence_transformer_without_remote_code():
    """Catches a module that sentence-transformers cannot drive, and audio at another rate."""
    torch.manual_seed(0)
    encoder = ContrastiveEncoder(ContrastiveConfig(bands=16, **SMALL))
    embedder = ContrastiveEmbedder(encoder, device="cpu")
    audio = tones([300.0, 900.0], 16_000, 0.6)
    direct = embedder.embed(audio, 16_000)
    clips = [{"array": clip.numpy(), "sampling_rate": 16_000} for clip in audio]
    assert torch.allclose(
        embedder.sentence_transformer.encode(clips, convert_to_tensor=True), direct, atol=1e-5
    )
    wrapped = SentenceTransformerEmbedder(embedder.sentence_transformer, sampling_rate=16_000)
    at_other_rate = wrapped.embed(tones([300.0, 900.0], 48_000, 0.6), 48_000)
    assert torch.nn.functional.cosine_similarity(at_other_rate, direct).min() > 0.999


def test_codes_of_another_codec_are_refused():
    embedder = ContrastiveEmbedder(
        ContrastiveEncoder(ContrastiveConfig(reads="codes", **SMALL)), device="cpu"
    )
    with pytest.raises(ValueError, match=r"\[B, 4, T\]"):
        embedder.embed(torch.zeros(2, 8, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="shorter than one patch"):
        embedder.embed(torch.zeros(2, 4, 2, dtype=torch.long))
