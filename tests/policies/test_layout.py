"""What a MusicGen folder consists of, against models that are really built and really play."""

import pytest
import torch
from transformers import GenerationConfig, MusicgenForConditionalGeneration

from diverse_cfg.policies.musicgen.family import MUSICGEN as layout
from tests.tiny import tiny_musicgen, tiny_processor


def test_expected_tensors_are_those_that_are_saved(tiny_folder):
    """Catches tied tensors that are counted twice, and computed tables that no file holds."""
    from safetensors.torch import load_file

    saved = {name: tuple(t.shape) for name, t in load_file(f"{tiny_folder}/model.safetensors").items()}
    shapes, aliases = layout.expected_tensors(layout.load_config(tiny_folder))
    assert shapes == saved
    assert aliases == {"text_encoder.encoder.embed_tokens.weight": "text_encoder.shared.weight"}


@pytest.mark.parametrize("channels", [1, 2])
def test_frames_and_tokens(channels):
    """The delay pattern is three steps longer than the clip, in stereo too (its pairs share a delay)."""
    model = tiny_musicgen(channels)
    tokens = layout.num_frames_to_tokens(9, model.config)
    assert tokens == 9 + 3
    inputs = tiny_processor()(text=["sad cello"], return_tensors="pt")
    audio = model.generate(**inputs, max_new_tokens=tokens, guidance_scale=1.0)
    assert audio.shape == (1, channels, 9 * 64)
    assert layout.frames_to_seconds(9, model.config) == pytest.approx(9 * 64 / 3200)


def test_max_length_becomes_the_tokens_that_it_gave():
    """The released checkpoints say max_length; read from a generation config, it counts the new tokens."""
    model = tiny_musicgen()
    inputs = tiny_processor()(text=["sad cello"], return_tensors="pt")
    model.generation_config = GenerationConfig(
        max_length=15,
        do_sample=True,
        guidance_scale=3.0,
        pad_token_id=16,
        bos_token_id=16,
        decoder_start_token_id=16,
    )
    length = model.generate(**inputs).shape[-1]
    playing = layout.playing_config(model.config, None, model.generation_config)
    assert (playing.max_length, playing.max_new_tokens, playing.guidance_scale) == (None, 15, 1.0)
    model.generation_config = playing
    assert model.generate(**inputs).shape[-1] == length


def test_ids_that_a_training_framework_overwrote():
    """T5's 0 and 1 in the place of MusicGen's one special id: code 0 would be dropped as padding."""
    config = tiny_musicgen().config
    config.pad_token_id = config.decoder.pad_token_id = 0
    config.decoder.eos_token_id = config.decoder.bos_token_id = config.decoder_start_token_id = 1
    layout.repair_token_ids(config)
    assert (config.pad_token_id, config.decoder.pad_token_id, config.decoder.bos_token_id) == (16, 16, 16)
    assert (config.decoder_start_token_id, config.decoder.decoder_start_token_id) == (16, 16)
    assert config.decoder.eos_token_id is None


def test_storage_types_are_those_in_which_it_is_loaded(tiny_folder):
    """What transformers keeps in float32 of a float16 model is stored so; catches a rounding that loading
    would not do."""
    model = MusicgenForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float16)
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert kept
    for name, tensor in model.state_dict().items():
        stored = layout.storage_dtype(name, torch.float32, torch.float16)
        assert stored == tensor.dtype or name.startswith(layout.codec_prefix), name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("decoder.model.decoder.layers.3.self_attn.q_proj.weight", "self-attention"),
        ("decoder.model.decoder.layers.3.self_attn_layer_norm.weight", "norms"),
        ("decoder.model.decoder.layers.3.encoder_attn.v_proj.weight", "cross-attention"),
        ("decoder.model.decoder.layers.3.encoder_attn_layer_norm.bias", "norms"),
        ("decoder.model.decoder.layers.3.fc2.weight", "feed-forward"),
        ("decoder.model.decoder.embed_tokens.1.weight", "code embeddings"),
        ("decoder.lm_heads.0.weight", "heads"),
        ("enc_to_dec_proj.bias", "text projection"),
        ("text_encoder.encoder.final_layer_norm.weight", "text encoder"),
        ("audio_encoder.quantizer.layers.0.codebook.embed", "codec"),
    ],
)
def test_part_of(name, part):
    assert layout.part_of(name) == part
