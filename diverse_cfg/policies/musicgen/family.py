"""MusicGen's folders and configurations: its parts, its delay pattern, its special token."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, MusicgenConfig, MusicgenForConditionalGeneration, MusicgenProcessor

from diverse_cfg.policies.families import PROCESSOR_REMEDY, Family, declared_settings, register
from diverse_cfg.policies.musicgen.model import codebook_delays
from diverse_cfg.policies.musicgen.policy import MusicGenPolicy
from diverse_cfg.reading import reading

# Tables that older versions saved although they are computed.
_COMPUTED = ("embed_positions.weights", "position_ids")
_OLD_WEIGHT_NORM = {
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}


class MusicGen(Family):
    """MusicGen (arXiv 2306.05284) in transformers' layout: a T5, a decoder, an EnCodec."""

    model_type = MusicgenConfig.model_type
    model_class = MusicgenForConditionalGeneration
    policy_class = MusicGenPolicy
    codec_prefix = "audio_encoder."
    guidance_bias = "enc_to_dec_proj.bias"
    processor_needs = Family.processor_needs | {
        "processor": ("processor_config.json", "preprocessor_config.json")
    }

    def load_config(self, folder: str | os.PathLike) -> MusicgenConfig:
        with special_token_is_no_news():
            return super().load_config(folder)

    def architecture(self, config: MusicgenConfig, *, changed: bool = False) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for part in ("text_encoder", "audio_encoder", "decoder"):
            settings = declared_settings(getattr(config, part), changed=changed)
            values |= {f"{part}.{name}": value for name, value in settings.items()}
        return values

    def describe(self, config: MusicgenConfig) -> dict[str, Any]:
        decoder = config.decoder
        return {
            "decoder_layers": decoder.num_hidden_layers,
            "hidden_size": decoder.hidden_size,
            "codebooks": decoder.num_codebooks,
            "codebook_size": decoder.vocab_size,
            "audio_channels": decoder.audio_channels,
            "sampling_rate": config.audio_encoder.sampling_rate,
        }

    def saved_config(self, config: MusicgenConfig, dtype: torch.dtype) -> MusicgenConfig:
        config = self.repair_token_ids(super().saved_config(config, dtype))
        config.text_encoder.dtype = config.decoder.dtype = dtype
        return config

    def canonical_name(self, name: str, aliases: Mapping[str, str]) -> str | None:
        if name.endswith(_COMPUTED):
            return None
        for old, new in _OLD_WEIGHT_NORM.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return aliases.get(name, name)

    def storage_dtype(self, name: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """The type in which a tensor is saved when a model is asked for in `dtype`.

        The codec keeps at least the precision that it has: half precision is heard there, and it is small. So
        does what T5 cannot do in float16 and transformers therefore keeps in float32, the feed-forward outputs.
        """
        if not stored.is_floating_point:
            return stored
        fragile = dtype == torch.float16 and name.startswith("text_encoder.") and ".wo." in name
        codec = name.startswith(self.codec_prefix)
        return torch.promote_types(stored, dtype) if fragile or codec else dtype

    def part_of(self, name: str) -> str:
        for prefix, part in (
            ("text_encoder.", "text encoder"),
            ("audio_encoder.", "codec"),
            ("enc_to_dec_proj.", "text projection"),
            ("decoder.lm_heads.", "heads"),
            ("decoder.model.decoder.embed", "code embeddings"),
        ):
            if name.startswith(prefix):
                return part
        for piece, part in (
            ("self_attn", "self-attention"),
            ("encoder_attn", "cross-attention"),
            ("fc", "feed-forward"),
        ):
            if f".{piece}" in name and "norm" not in name:
                return part
        return "norms"

    def load_processor(
        self, folder: Path, source: str | os.PathLike, config: MusicgenConfig | None
    ) -> MusicgenProcessor:
        with reading(folder, PROCESSOR_REMEDY):
            processor = AutoProcessor.from_pretrained(str(folder))
        if not isinstance(processor, MusicgenProcessor):
            raise ValueError(
                f"{source} has a {type(processor).__name__}, not a MusicgenProcessor: is it a MusicGen?"
            )
        pieces = max(processor.tokenizer.get_vocab().values()) + 1
        if config and pieces > config.text_encoder.vocab_size:
            raise ValueError(
                f"{folder} has a tokenizer with {pieces} pieces, but its text encoder knows "
                f"{config.text_encoder.vocab_size}: {PROCESSOR_REMEDY}"
            )
        return processor

    def load_model(self, folder: Path, source: str) -> MusicgenForConditionalGeneration:
        model = super().load_model(folder, source)
        decoder: Any = model.config.decoder
        if decoder.pad_token_id != decoder.vocab_size:
            raise ValueError(
                f"{source} has config.decoder.pad_token_id={decoder.pad_token_id}, but MusicGen's only special token "
                f"is {decoder.vocab_size} (vocab_size): another program overwrote it; set pad, bos and decoder_start "
                f"to {decoder.vocab_size} in config.json and generation_config.json"
            )
        return model

    def cast(self, model: Any, dtype: torch.dtype) -> None:
        positions = model.decoder.model.decoder.embed_positions
        rounded = positions.weights.dtype != torch.float32
        model.to(dtype)
        if rounded:  # the table is computed, not stored: widened, it would stay rounded
            positions.make_weights(*positions.weights.shape)
        model.audio_encoder.float()

    def num_frames_to_tokens(self, num_frames: int, config: MusicgenConfig) -> int:
        """`max_new_tokens` for T frames: the delay pattern adds K − 1 steps in mono and K/2 − 1 in stereo."""
        decoder = config.decoder
        return num_frames + max(codebook_delays(decoder.num_codebooks, decoder.audio_channels))

    def frames_to_seconds(self, num_frames: int, config: MusicgenConfig) -> float:
        codec = config.audio_encoder
        return num_frames * math.prod(codec.upsampling_ratios) / codec.sampling_rate

    def special_tokens(self, config: MusicgenConfig) -> dict[str, int]:
        codebook_size = config.decoder.vocab_size
        return dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), codebook_size)

    def repair_token_ids(self, config: MusicgenConfig) -> MusicgenConfig:
        """Set pad, bos and start to the id after the last code (2048 for the released models), in place.

        Training frameworks write the text encoder's 0 and 1 there; generation would then drop code 0 as padding.
        """
        codebook_size = config.decoder.vocab_size
        config.pad_token_id = config.decoder.pad_token_id = codebook_size
        config.decoder.bos_token_id = codebook_size
        config.decoder_start_token_id = config.decoder.decoder_start_token_id = codebook_size
        config.decoder.eos_token_id = None
        return config


@contextlib.contextmanager
def special_token_is_no_news() -> Iterator[None]:
    """Without transformers' remark that the special token lies outside of the vocabulary: so it does in every
    MusicGen, the released ones too, and nothing follows from it. It is made once for each configuration's size."""
    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(_is_news)
    try:
        yield
    finally:
        log.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "must be `None` or an integer within the vocabulary" not in record.getMessage()


MUSICGEN = MusicGen()
register(MUSICGEN)
