"""What AudioCraft computed once, frozen: checkpoints read without the audiocraft package give the same."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diverse_cfg.policies.audiocraft import export_audiocraft, is_audiocraft, load_audiocraft
from diverse_cfg.policies.audiocraft.configuration import bandwidth
from diverse_cfg.policies.audiocraft.folders import checkpoint_files, transformers_folder
from diverse_cfg.policies.audiocraft.stored_config import StoredConfig
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.musicgen.family import MUSICGEN
from diverse_cfg.policies.sampler.rollout import decode_codes
from tests.policies.audiocraft_world import PROMPTS, check_equal, edit

DATA = Path(__file__).parent / "data" / "audiocraft"


@pytest.fixture(scope="module", params=["mono", "stereo"])
def frozen(request):
    """Folder, converted model and processor, and what AudioCraft made of it."""
    folder = DATA / request.param
    return folder, *load_audiocraft(folder), load_file(folder / "expected.safetensors")


def test_everything_is_audiocrafts(frozen):
    """Logits are of the size of 5; another processor rounds differently."""
    _, *converted, expected = frozen
    check_equal(*converted, expected, tolerance=2e-5, guided_tolerance=6e-5, audio_tolerance=1e-6)


def test_round_trip_is_equal_to_the_bit(frozen, tmp_path):
    folder, model, processor, _ = frozen
    export_audiocraft(model, tmp_path / "back", processor=processor)
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        before, after = (
            torch.load(path / name, weights_only=True)["best_state"] for path in (folder, tmp_path / "back")
        )
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before
        )
    again, _ = load_audiocraft(tmp_path / "back")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert MUSICGEN.architecture(again.config) == MUSICGEN.architecture(model.config), (
        "it could not be merged with its original"
    )


def test_generation_defaults_are_audiocrafts(frozen):
    """transformers' own would be a top-k of 50, no guidance and 20 tokens."""
    _, model, _, _ = frozen
    settings = model.generation_config
    assert (settings.top_k, settings.guidance_scale, settings.do_sample) == (250, 3.0, True)
    assert settings.max_new_tokens == 30 * 50 + 3  # 30 s at 50 frames, and three steps of delay
    special = model.config.decoder.vocab_size
    assert settings.pad_token_id == settings.decoder_start_token_id == special == 16
    assert not model.training and model.dtype == torch.float32


def test_transformers_itself_plays_the_conversion(frozen, monkeypatch, tmp_path):
    """The folder that everything above the seam sees is a MusicGen like any other."""
    from transformers import pipeline

    folder, *_ = frozen
    converted = transformers_folder(folder)
    settings = {"max_new_tokens": 12, "do_sample": False}
    audio = pipeline("text-to-audio", model=converted)("sad cello", generate_kwargs=settings)
    assert audio["sampling_rate"] == 3200
    assert audio["audio"].shape[-1] == 9 * 64


def test_the_policy_and_the_processor_load_from_the_folder(frozen):
    folder, model, processor, _ = frozen
    policy = load_policy(folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), policy.state_dict().values(), strict=True)
    )
    assert policy.generation_config.guidance_scale == 3.0
    assert policy.config._name_or_path == str(folder), (
        "an adapter names the checkpoint as its base, not the cache"
    )
    assert (
        load_processor(folder)(text=PROMPTS, padding=True)["input_ids"]
        == processor(text=PROMPTS, padding=True)["input_ids"]
    )


def test_half_precision_is_kept_in_the_conversion_and_trained_in_float32(tmp_path):
    """The released checkpoints are float16: twice the disk for nothing, or updates lost to rounding."""
    folder = Path(shutil.copytree(DATA / "mono", tmp_path / "half"))
    package = torch.load(folder / "state_dict.bin", weights_only=True)
    package["best_state"] = {key: tensor.half() for key, tensor in package["best_state"].items()}
    torch.save(package, folder / "state_dict.bin")
    stored = load_file(Path(transformers_folder(folder)) / "model.safetensors")
    assert stored["decoder.lm_heads.0.weight"].dtype == torch.float16
    assert stored["audio_encoder.quantizer.layers.0.codebook.embed"].dtype == torch.float32
    policy = load_policy(folder)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert torch.equal(policy.decoder.lm_heads[0].weight, package["best_state"]["linears.0.weight"].float())
    export_audiocraft(policy, tmp_path / "out", processor=load_processor(folder), dtype=torch.float16)
    again = torch.load(tmp_path / "out" / "state_dict.bin", weights_only=True)["best_state"]
    assert all(torch.equal(again[key], tensor) for key, tensor in package["best_state"].items())


def test_a_changed_checkpoint_is_converted_again(tmp_path):
    """Catches a cache that plays yesterday's weights."""
    folder = Path(shutil.copytree(DATA / "mono", tmp_path / "m"))
    first = Path(transformers_folder(folder))
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert Path(transformers_folder(folder)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before, "it was converted twice"
    package = torch.load(folder / "state_dict.bin", weights_only=True)
    package["best_state"]["linears.0.weight"].add_(1.0)
    torch.save(package, folder / "state_dict.bin")
    changed = load_policy(folder)
    assert torch.equal(changed.decoder.lm_heads[0].weight, package["best_state"]["linears.0.weight"])


def test_two_files_in_two_places(tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(DATA / "mono" / "state_dict.bin", tmp_path / "a" / "lm.bin")
    model, _ = load_audiocraft(
        (tmp_path / "a" / "lm.bin", DATA / "mono" / "compression_state_dict.bin"),
        text_encoder=DATA / "mono" / "text_encoder",
    )
    reference, _ = load_audiocraft(DATA / "mono")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    with pytest.raises(ValueError, match="two files"):
        load_audiocraft([tmp_path / "a" / "lm.bin"])


def test_the_codec_that_is_only_named(tmp_path, frozen):
    """A pointer, as the releases have it for their codec: to a transformers folder, or to another export."""
    source, model, _, expected = frozen
    folder = Path(shutil.copytree(source, tmp_path / "pointer"))
    model.audio_encoder.save_pretrained(folder / "encodec_32khz")
    shutil.move(folder / "compression_state_dict.bin", tmp_path / "codec.bin")
    for target in ("encodec_32khz", f"//pretrained/{tmp_path}/codec.bin"):
        pointer = {"pretrained": target, "exported": True, "version": "1.3.0"}
        torch.save(pointer, folder / "compression_state_dict.bin")
        audio = decode_codes(load_policy(folder), expected["codes"])
        torch.testing.assert_close(
            audio.reshape(expected["decoded_audio"].shape), expected["decoded_audio"], atol=1e-6, rtol=0
        )


def test_a_codec_of_which_fewer_codebooks_are_used(tmp_path):
    """`compression_model_n_q`: AudioCraft then encodes with the first ones only."""
    folder = Path(shutil.copytree(DATA / "mono", tmp_path / "m"))
    lost = ("emb.2", "emb.3", "linears.2", "linears.3")
    edit(
        folder / "state_dict.bin",
        ("n_q: 4", "n_q: 2"),
        ("delays: [0, 1, 2, 3]", "delays: [0, 1]"),
        ("compression_model_n_q: null", "compression_model_n_q: 2"),
        state=lambda state: [state.pop(key) for key in list(state) if key.startswith(lost)],
    )
    model, _ = load_audiocraft(folder)
    assert model.config.decoder.num_codebooks == 2
    assert model.audio_encoder.config.num_quantizers == 4
    with torch.no_grad():
        assert model.audio_encoder.encode(torch.randn(1, 1, 640)).audio_codes.shape[2] == 2


def test_attention_as_pytorchs_own_class(tmp_path):
    """`custom: false` stores the same matrices one level deeper."""
    folder = Path(shutil.copytree(DATA / "mono", tmp_path / "m"))
    package = torch.load(folder / "state_dict.bin", weights_only=True)
    package["best_state"] = {
        key.replace("self_attn.", "self_attn.mha.").replace(
            "cross_attention.", "cross_attention.mha."
        ): tensor
        for key, tensor in package["best_state"].items()
    }
    torch.save(package, folder / "state_dict.bin")
    model, reference = load_audiocraft(folder)[0], load_audiocraft(DATA / "mono")[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_fine_tuned_text_encoder_is_taken_from_the_checkpoint(tmp_path):
    """`finetune: true` stores the T5; the one of that name would read the prompts differently."""
    folder = Path(shutil.copytree(DATA / "mono", tmp_path / "m"))
    t5 = load_file(folder / "text_encoder" / "model.safetensors")
    package = torch.load(folder / "state_dict.bin", weights_only=True)
    prefix = "condition_provider.conditioners.description.t5."
    trained = {prefix + key: tensor + 1.0 for key, tensor in t5.items()}
    trained[prefix + "encoder.embed_tokens.weight"] = trained[prefix + "shared.weight"]
    package["best_state"] |= trained
    torch.save(package, folder / "state_dict.bin")
    model, _ = load_audiocraft(folder)
    assert torch.equal(model.text_encoder.shared.weight, t5["shared.weight"] + 1.0)


def test_which_folders_are_audiocrafts(tmp_path, tiny_folder):
    assert is_audiocraft(DATA / "mono")
    assert not is_audiocraft(tiny_folder)
    assert not is_audiocraft(tmp_path)
    assert not is_audiocraft(tmp_path / "nothing")
    assert not is_audiocraft("nobody/nothing")
    assert transformers_folder(tiny_folder) == str(tiny_folder)
    assert [path.name for path in checkpoint_files(str(DATA / "mono"))] == [
        "state_dict.bin",
        "compression_state_dict.bin",
    ]


def test_references_in_a_configuration():
    text = "a: {b: 3, c: '${a.b}', text: 'x${a.b}y${d}'}\nd: '${a.c}'\ne: '${a}'"
    text += "\nenv: '${oc.env:HOME}'\nloop: '${loop}'"
    cfg = StoredConfig(text, "run")
    assert (cfg.get("a.c"), cfg.get("d"), cfg.get("e.b"), cfg.get("a.text")) == (3, 3, 3, "x3y3")
    assert cfg.get("e") == {"b": 3, "c": 3, "text": "x3y3"}
    assert cfg.get("nothing.here") is None
    for path in ("env", "loop"):
        with pytest.raises(ValueError, match=f"run: {path} in its configuration refers to"):
            cfg.get(path)
    with pytest.raises(ValueError, match=r"lacks nothing\.here"):
        cfg.require("nothing.here")
    with pytest.raises(ValueError, match="not valid YAML"):
        StoredConfig("a: [", "run")
    with pytest.raises(ValueError, match="not a mapping"):
        StoredConfig("- 1", "run")


@pytest.mark.parametrize("bins", [16, 400, 512, 1024, 2048])
def test_the_bandwidth_names_the_number_of_codebooks(bins):
    """transformers derives it by a division that rounds down, which loses a codebook to rounding."""
    from transformers import EncodecConfig

    for sampling_rate, ratios in (
        (32000, [8, 5, 4, 4]),
        (16000, [4, 4, 5, 8]),
        (24000, [8, 5, 4, 2]),
        (3200, [8, 8]),
    ):
        hop = EncodecConfig(upsampling_ratios=ratios).hop_length
        for count in range(1, 33):
            config = EncodecConfig(
                target_bandwidths=[bandwidth(count, sampling_rate, hop, bins)],
                sampling_rate=sampling_rate,
                upsampling_ratios=ratios,
                codebook_size=bins,
            )
            assert config.num_quantizers == count
