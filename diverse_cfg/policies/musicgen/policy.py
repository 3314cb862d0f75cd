"""MusicGen as a policy: `model` on given codes, `sampler` for new ones."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EncodecFeatureExtractor, MusicgenConfig, MusicgenProcessor

from diverse_cfg.policies.musicgen import model as musicgen
from diverse_cfg.policies.policy import Policy
from diverse_cfg.policies.sampler import batches
from diverse_cfg.policies.sampler.rollout import RolloutWeights, decode_codes, sample_codes
from diverse_cfg.policies.shift import SHIFT
from diverse_cfg.types import Clips, TextCondition


class MusicGenPolicy(Policy):
    """A `MusicgenForConditionalGeneration` (arXiv 2306.05284): its decoder and the projection into it are trained, and
    what it adds for a γ that it is told."""

    trained = ("decoder.", "enc_to_dec_proj.", f"{SHIFT}.")
    shared = ("text_encoder", "audio_encoder")
    lora_targets = musicgen.LORA_TARGET_MODULES

    @property
    def dtype(self) -> torch.dtype:
        return self.model.decoder.dtype

    @property
    def vocab_size(self) -> int:
        return self.model.config.decoder.vocab_size

    @property
    def max_steps(self) -> int:
        return self.model.config.decoder.max_position_embeddings

    @property
    def delays(self) -> tuple[int, ...]:
        return musicgen.delays(self.model)

    @property
    def frame_rate(self) -> float:
        return musicgen.frame_rate(self.model)

    @property
    def sampling_rate(self) -> int:
        return self.model.config.audio_encoder.sampling_rate

    @property
    def usual_seconds(self) -> float:
        return musicgen.usual_seconds(self.model)

    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        return musicgen.encode_text(self.model, self.processor, prompts)

    def hidden_states(self, codes: Tensor, condition: TextCondition | None) -> Tensor:
        return musicgen.code_hidden_states(self.model, codes, condition)

    def head_weights(self) -> Tensor:
        return musicgen.head_weights(self.model)

    def code_logits(self, codes: Tensor, condition: TextCondition | None) -> Tensor:
        return musicgen.code_logits(self.model, codes, condition)

    def decode(self, codes: Tensor) -> Tensor:
        return decode_codes(self.model, codes)

    @property
    def audio_channels(self) -> int:
        return self.model.config.decoder.audio_channels

    def encode(self, waveforms: Tensor) -> Tensor:
        return musicgen.encode_audio(self.model, waveforms)

    def snapshot(self, dtype: torch.dtype | None = None) -> RolloutWeights:
        return RolloutWeights.from_model(self.model, dtype)

    def sample(self, condition: TextCondition, num_frames: int, **options: Any) -> Clips:
        """See `sample_codes`."""
        return sample_codes(self.model, condition, num_frames, **options)

    @property
    def hidden_units(self) -> int:
        config = self.model.config.decoder
        return config.num_hidden_layers * config.hidden_size

    def snapshot_bytes(self, dtype: torch.dtype) -> int:
        """Of a `RolloutWeights`, whose matrices have the rollout's dtype; embeddings, positions, norms and the text's
        projection are in float32 at least. Adapters are added into the matrices."""
        config = self.model.config.decoder
        wide = torch.promote_types(dtype, torch.float32).itemsize
        total = config.max_position_embeddings * config.hidden_size * wide
        for name, parameter in self.model.named_parameters():
            if name.startswith(self.trained) and "lora_" not in name:
                narrow = (
                    parameter.ndim == 2 and "embed" not in name and not name.startswith("enc_to_dec_proj.")
                )
                total += parameter.numel() * (dtype.itemsize if narrow else wide)
        return total

    def cache_bytes(self, num_frames: int, guided: bool, dtype: torch.dtype) -> int:
        return batches.cache_bytes(self.model.config.decoder, num_frames, guided, dtype, self.model.device)

    def automatic_batch(self, num_frames: int, guided: bool, dtype: torch.dtype) -> int:
        return batches.automatic_batch(self.model, num_frames, guided, dtype)

    def prepare_training(self, device: torch.device) -> None:
        self.model.config.__class__ = TrainerFacingConfig
        if device.type == "cpu":
            # At clip lengths of a CPU run, fused attention's backward pass is twice as slow as plain matrix
            # products.
            self.model.decoder.set_attn_implementation("eager")

    def processor_of(self, tokenizer: Any) -> MusicgenProcessor:
        """The tokenizer, with the feature extractor of this codec beside it."""
        channels = self.model.config.decoder.audio_channels
        features = EncodecFeatureExtractor(feature_size=channels, sampling_rate=self.sampling_rate)
        return MusicgenProcessor(features, tokenizer)


class TrainerFacingConfig(MusicgenConfig):
    """A MusicGen configuration that can be asked for "the" text configuration.

    MusicGen has two candidates and refuses to choose, while TRL and transformers read it and write T5's token
    ids into it. They get a throw-away copy of the decoder's. Saved, this is an ordinary MusicGen
    configuration.
    """

    def get_text_config(self, *_: Any, **__: Any):
        return copy.deepcopy(self.decoder)
