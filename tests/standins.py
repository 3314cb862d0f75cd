"""Stand-ins for the released MusicGen repositories: their files, fields and defaults, at toy widths.

What the released folders have and a freshly saved model has not: a generation config with guidance 3.0 and
`max_length` 1500, T5's sub-configuration written out with its own pad and eos ids, a 32 kHz codec at 50
frames per second with 2048 codes, codec weights under the old names of weight norm, a
`preprocessor_config.json`, and (stereo) weights in half precision.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    EncodecConfig,
    EncodecFeatureExtractor,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
    T5Config,
    T5Tokenizer,
)

from tests.tiny import _fill

SIZES = ("small", "medium", "large", "stereo-small")


def t5_tokenizer() -> T5Tokenizer:
    """T5's special tokens, 100 sentinels, limit of 512 tokens; a vocabulary of letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.;:'’-–—/()áéíóú"
    pieces += [("▁", -3.0)] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=100, model_max_length=512)


def released_config(size: str) -> MusicgenConfig:
    """The released configuration with narrow layers."""
    channels = 2 if size.startswith("stereo") else 1
    text = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.1,
        n_positions=512,
        tie_word_embeddings=True,
    )
    codec = EncodecConfig(
        target_bandwidths=[2.2],
        sampling_rate=32_000,
        audio_channels=1,
        hidden_size=16,
        num_filters=2,
        num_residual_layers=1,
        upsampling_ratios=[8, 5, 4, 4],
        norm_type="weight_norm",
        num_lstm_layers=1,
        codebook_size=2048,
        codebook_dim=16,
        use_causal_conv=False,
        use_conv_shortcut=False,
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=2048,
        max_position_embeddings=2048,
        num_hidden_layers=2 if size == "large" else 1,
        ffn_dim=32,
        num_attention_heads=2,
        hidden_size=16,
        dropout=0.1,
        num_codebooks=4 * channels,
        audio_channels=channels,
        pad_token_id=2048,
        bos_token_id=2048,
        eos_token_id=None,
    )
    return MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)


def save_standin(folder: str | Path, size: str = "small", seed: int = 0) -> str:
    """Write the repository of `facebook/musicgen-{size}` and return its path."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MusicgenForConditionalGeneration(released_config(size))
        for name, parameter in model.named_parameters():
            _fill(name, parameter.data)
        for layer in model.audio_encoder.quantizer.layers:
            layer.codebook.embed.normal_()
    if size.startswith("stereo"):
        model.half()
    model.save_pretrained(folder)
    weights = {_old_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": 2048,
        "decoder_start_token_id": 2048,
        "do_sample": True,
        "guidance_scale": 3.0,
        "max_length": 1500,
        "pad_token_id": 2048,
        "transformers_version": "4.31.0.dev0",
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    channels = 2 if size.startswith("stereo") else 1
    extractor = EncodecFeatureExtractor(feature_size=channels, sampling_rate=32_000)
    MusicgenProcessor(extractor, t5_tokenizer()).save_pretrained(folder)
    combined = folder / "processor_config.json"
    if combined.is_file():  # newer versions write one file where the released repositories have another
        combined.unlink()
    content = extractor.to_dict() | {"processor_class": "MusicgenProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2))
    return str(folder)


def _old_name(name: str) -> str:
    return name.replace(".parametrizations.weight.original0", ".weight_g").replace(
        ".parametrizations.weight.original1", ".weight_v"
    )
