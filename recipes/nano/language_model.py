"""The language model of the nano world: T5 encoder + MusicGen decoder over the delayed codes, trained on captions.

The caption is dropped for 15 % of the examples by an all-zero text mask, which is the null prompt of generation.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from captions import caption
from codec import CODEBOOK_SIZE, NUM_CODEBOOKS, codec_config
from data import Clips
from torch import nn
from training import Schedule, train
from transformers import (
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
    T5Tokenizer,
)

from diverse_cfg.functional.codebooks import apply_delay_pattern, revert_delay_pattern
from diverse_cfg.nano.attributes import ATTRIBUTES

CAPTION_DROPOUT = 0.15
PAD = CODEBOOK_SIZE


def build_tokenizer() -> T5Tokenizer:
    """Whole words of the captions, and letters, so that every other word can be read too."""
    text = " ".join(name for names in ATTRIBUTES.values() for name in names)
    rng = np.random.default_rng(0)
    example = {"instrument": "organ", "tempo": "slow", "register": "low", "key": "C major"}
    text += " " + " ".join(caption(example, rng) for _ in range(200))
    words = sorted(set(text.replace(",", " ").replace(":", " ").split()))
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;'-#&"
    pieces = [(f"▁{word}", -3.0) for word in words if len(word) > 1]
    return T5Tokenizer(
        vocab=specials + pieces + [("▁", -8.0)] + [(letter, -10.0) for letter in letters], extra_ids=0
    )


def build_language_model(tokenizer: T5Tokenizer) -> MusicgenForConditionalGeneration:
    text = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.05,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    decoder = MusicgenDecoderConfig(
        vocab_size=CODEBOOK_SIZE, max_position_embeddings=256, num_hidden_layers=5, ffn_dim=640, hidden_size=160,
        num_attention_heads=5, dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, num_codebooks=NUM_CODEBOOKS,
        pad_token_id=PAD, bos_token_id=PAD, eos_token_id=None,
    )  # fmt: skip
    decoder.decoder_start_token_id = PAD
    return MusicgenForConditionalGeneration(
        MusicgenConfig(text_encoder=text, audio_encoder=codec_config(), decoder=decoder)
    )


class LanguageModel(nn.Module):
    """The trained part of the MusicGen (all but the codec), with its loss."""

    def __init__(self, model: MusicgenForConditionalGeneration, tokenizer: T5Tokenizer):
        super().__init__()
        self.text_encoder, self.projection, self.decoder = (
            model.text_encoder,
            model.enc_to_dec_proj,
            model.decoder,
        )
        self.tokenizer = tokenizer

    def forward(self, codes: torch.Tensor, captions: list[str], keep: torch.Tensor) -> torch.Tensor:
        """Cross-entropy per codebook [K] in nats of `codes` [B, K, T]; `keep` [B] is 0 where the caption is dropped."""
        text = self.tokenizer(captions, padding=True, return_tensors="pt")
        mask = text.attention_mask * keep[:, None]
        states = self.projection(self.text_encoder(text.input_ids, attention_mask=text.attention_mask)[0])
        states = states * mask[:, :, None]
        batch, books, frames = codes.shape
        delays = tuple(range(books))
        inputs = apply_delay_pattern(codes, PAD, delays)[..., :-1]
        logits = self.decoder(
            input_ids=inputs.reshape(batch * books, -1), encoder_hidden_states=states, encoder_attention_mask=mask,
            use_cache=False,
        ).logits  # fmt: skip
        logits = revert_delay_pattern(logits.view(batch, books, -1, CODEBOOK_SIZE), frames, delays).float()
        nll = nn.functional.cross_entropy(
            logits.reshape(-1, CODEBOOK_SIZE), codes.reshape(-1), reduction="none"
        )
        return nll.view(batch, books, frames).mean((0, 2))


def train_language_model(
    model: MusicgenForConditionalGeneration, tokenizer: T5Tokenizer, clips: Clips, codes: np.ndarray, held_out: Clips,
    held_codes: np.ndarray, schedule: Schedule, folder: Path, seed: int, batch: int = 24,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model.decoder.set_attn_implementation(
        "eager"
    )  # 2.4 x faster than fused attention for short rows on a CPU
    language_model = LanguageModel(model, tokenizer)

    def examples(source: Clips, codes: np.ndarray, index, rng: np.random.Generator):
        texts = [caption(source.attributes[i], rng) for i in index]
        return torch.from_numpy(codes[index].astype(np.int64)), texts

    def loss_of_step(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 3, step])
        torch.manual_seed(int(rng.integers(2**31)))  # dropout
        batch_codes, texts = examples(clips, codes, rng.integers(len(clips), size=batch), rng)
        keep = torch.from_numpy(rng.random(batch) >= CAPTION_DROPOUT).long()
        with torch.autocast("cpu", torch.bfloat16):
            return language_model(batch_codes, texts, keep).mean()

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        rng = np.random.default_rng(seed)
        losses = {"conditional": [], "unconditional": []}
        with torch.autocast("cpu", torch.bfloat16):
            for index in np.array_split(np.linspace(0, len(held_out) - 1, 384).astype(int), 8):
                batch_codes, texts = examples(held_out, held_codes, index, rng)
                for name, value in (("conditional", 1), ("unconditional", 0)):
                    keep = torch.full((len(index),), value)
                    losses[name].append(language_model(batch_codes, texts, keep))
        per_book = torch.stack(losses["conditional"]).mean(0)
        null = torch.stack(losses["unconditional"]).mean().item()
        row = {"validation_loss": per_book.mean().item(), "validation_null": null}
        row["bits_per_second"] = per_book.sum().item() / math.log(2) * 25
        return row | {f"validation_codebook_{k}": v.item() for k, v in enumerate(per_book)}

    train("language_model", language_model, loss_of_step, evaluate, schedule, folder, clip=1.0, ema=0.9995)
