"""A MusicGen of a few thousand parameters, built in memory: true architecture, audible differences, no files.

Two things a default-initialised model would hide are undone here. A fresh EnCodec has all-zero codebooks, so
every clip would sound the same; they are filled. And MusicGen's initialiser (std 0.02) gives logits that are
flat to three digits, so that guidance, prompts and sampling filters change nothing; every matrix is drawn
with unit gain instead, every norm with a bias, so that a forgotten bias or a swapped row shows.
"""

from __future__ import annotations

import os

import torch
from transformers import (
    EncodecConfig,
    EncodecFeatureExtractor,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
    T5Config,
    T5Tokenizer,
)

WORDS = ["a", "calm", "fast", "slow", "happy", "sad", "piano", "flute", "cello", "drum", "song", "in", "the"]
WORDS += ["key", "of", "c", "d", "e", "f", "g", "major", "minor"]
PROMPTS = ["a calm piano song", "fast flute in d minor", "sad cello", "happy drum song in the key of g"]


def tiny_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer over `WORDS` and single letters; pad 0, eos 1, unk 2 as T5 has them."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -1.0) for word in WORDS]
    letters = [("▁", -5.0)] + [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.'"]
    return T5Tokenizer(vocab=specials + pieces + letters, extra_ids=0)


def tiny_config(
    audio_channels: int = 1,
    *,
    num_codebooks: int = 4,
    vocab_size: int = 16,
    hidden_size: int = 16,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 2,
    max_position_embeddings: int = 128,
    dropout: float = 0.1,
    sampling_rate: int = 3200,
) -> MusicgenConfig:
    """Configuration of `tiny_musicgen`. `num_codebooks` counts one channel; stereo has twice as many."""
    hop_length = 64
    bits = (vocab_size - 1).bit_length()
    frame_rate = -(-sampling_rate // hop_length)
    text = T5Config(
        vocab_size=len(tiny_tokenizer()),
        d_model=12,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=dropout,
    )
    codec = EncodecConfig(
        target_bandwidths=[num_codebooks * frame_rate * bits / 1000],
        sampling_rate=sampling_rate,
        audio_channels=1,
        hidden_size=8,
        num_filters=2,
        upsampling_ratios=[8, 8],
        num_lstm_layers=1,
        codebook_size=vocab_size,
        codebook_dim=8,
        use_causal_conv=False,
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        num_hidden_layers=num_hidden_layers,
        ffn_dim=2 * hidden_size,
        num_attention_heads=num_attention_heads,
        hidden_size=hidden_size,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        num_codebooks=num_codebooks * audio_channels,
        audio_channels=audio_channels,
        pad_token_id=vocab_size,
        bos_token_id=vocab_size,
        eos_token_id=None,
    )
    decoder.decoder_start_token_id = vocab_size
    return MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)


def tiny_musicgen(audio_channels: int = 1, seed: int = 0, **config) -> MusicgenForConditionalGeneration:
    """A random MusicGen in eval mode; the same `seed` gives the same weights. Keywords go to `tiny_config`.

    Its generation config asks for guidance 3.0, as the released checkpoints do, and its dropout is 0.1
    everywhere: code that forgets to neutralise either fails. The global random state is left as it was.
    """
    settings = tiny_config(audio_channels, **config)
    pad = settings.decoder.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MusicgenForConditionalGeneration(settings)
        for name, parameter in model.named_parameters():
            _fill(name, parameter)
        for layer in model.audio_encoder.quantizer.layers:
            layer.codebook.embed.normal_()
            layer.codebook.embed_avg.copy_(layer.codebook.embed)
    model.generation_config = GenerationConfig(
        do_sample=True,
        guidance_scale=3.0,
        max_new_tokens=20,
        pad_token_id=pad,
        bos_token_id=pad,
        decoder_start_token_id=pad,
    )
    return model.eval()


@torch.no_grad()
def _fill(name: str, parameter: torch.Tensor) -> None:
    if name.startswith("audio_encoder"):
        return  # its own initialisation is already audible
    if "norm" in name:
        parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    elif "embed" in name or "shared" in name or "relative_attention_bias" in name:
        parameter.normal_(std=1.0)
    elif parameter.dim() == 1:
        parameter.normal_(std=0.3)
    else:
        gain = 1.5 if "lm_heads" in name else 1.0
        parameter.normal_(std=gain * parameter.shape[-1] ** -0.5)


def tiny_processor(sampling_rate: int = 3200, audio_channels: int = 1) -> MusicgenProcessor:
    """The processor that belongs to `tiny_musicgen`."""
    features = EncodecFeatureExtractor(feature_size=audio_channels, sampling_rate=sampling_rate)
    return MusicgenProcessor(features, tiny_tokenizer())


def save_tiny(folder: str | os.PathLike, audio_channels: int = 1, seed: int = 0, **config) -> str:
    """Write model and processor as a MusicGen checkpoint folder that plain `transformers` loads; return its
    path."""
    model = tiny_musicgen(audio_channels, seed, **config)
    model.save_pretrained(folder)
    tiny_processor(model.config.audio_encoder.sampling_rate, audio_channels).save_pretrained(folder)
    return str(folder)
