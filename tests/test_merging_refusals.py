"""What cannot be merged exactly is refused by name, and nothing half-made is left: not the output, not a
temporary."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diverse_cfg.merging import load_slider, merge_checkpoints
from diverse_cfg.policies.tensors import _read_header
from tests import checkpoints as made
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made.make_world(tmp_path_factory.mktemp("refusals"))


@pytest.fixture
def refused(world, tmp_path):
    """Merge, expect an error that says `message`, and find the output's parent as empty as before."""

    def check(error, message, *sources, weights=None, **options):
        parent = tmp_path / "outputs"
        parent.mkdir(exist_ok=True)
        with pytest.raises(error, match=message) as caught:
            merge_checkpoints(list(sources), weights, parent / "merged", **options)
        assert list(parent.iterdir()) == []
        return str(caught.value)

    return check


def edit_weights(folder, change, file=made.MODEL):
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


# ---- other models


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 32}, "decoder.ffn_dim"),
        ({"num_hidden_layers": 3}, "decoder.num_hidden_layers"),
        ({"audio_channels": 2}, "decoder.audio_channels"),
        ({"num_attention_heads": 4}, "decoder.num_attention_heads"),
        ({"sampling_rate": 6400}, "audio_encoder"),
    ],
)
def test_another_architecture(world, tmp_path, refused, config, message):
    """Heads and sampling rate leave every shape as it is: only the configuration tells them apart."""
    channels = config.pop("audio_channels", 1)
    other = save_tiny(tmp_path / "other", channels, **config)
    text = refused(ValueError, message, world["full1"], other)
    assert str(world["full1"]) in text and other in text


def test_training_settings_are_not_architecture(world, tmp_path):
    """Catches a comparison so strict that a student with its dropout removed cannot meet its base."""
    other = made.copy(world["full2"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["decoder"] |= {"dropout": 0.0, "layerdrop": 0.3, "dtype": "float16"}
    config["transformers_version"] = "4.40.0"
    (other / "config.json").write_text(json.dumps(config))
    merge_checkpoints([world["full1"], other], 0.5, tmp_path / "m")


def test_another_codec(world, tmp_path, refused):
    """Same shapes, other codebook: the codes mean other sounds."""
    other = made.copy(world["full2"], tmp_path / "other")
    edit_weights(other, lambda w: w["audio_encoder.quantizer.layers.0.codebook.embed"].add_(1e-3))
    refused(ValueError, "different codecs", world["full1"], other)


def test_another_tokenizer(world, tmp_path, refused):
    other = made.copy(world["full2"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[3], vocabulary[4] = vocabulary[4], vocabulary[3]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(ValueError, "different tokenizers", world["full1"], other)


def test_melody_and_strangers(world, tmp_path, refused):
    other = made.copy(world["full2"], tmp_path / "other")
    made.edit_json(other / "config.json", model_type="musicgen_melody")
    refused(ValueError, "'musicgen_melody'", world["full1"], other)
    refused(FileNotFoundError, "no folder.*no Hub id", world["full1"], tmp_path / "nowhere")
    refused(FileNotFoundError, "failed", world["full1"], "nobody/nothing-at-all")
    refused(ValueError, "is a file", world["full1"], world["full1"] / made.MODEL)
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, r"no config\.json", world["full1"], tmp_path / "empty")


# ---- adapters


def test_adapters_of_different_bases(world, tmp_path, refused):
    """Catches adding one base's product to another base."""
    other_base = made.make_full(tmp_path / "other-base", world["base"], seed=7)
    other = made.make_adapter(tmp_path / "other", other_base, seed=2, **made.LORA2)
    text = refused(ValueError, "different bases", world["lora1"], other)
    assert str(other_base) in text
    with pytest.raises(ValueError, match="different bases"):
        load_slider(None, [world["lora1"], other])


def test_two_names_of_one_base(world, tmp_path, monkeypatch):
    """A relative path, a trailing slash and a moved base (with base=…) are the same base."""
    monkeypatch.chdir(world["base"].parent)
    relative = made.copy(world["lora2"], tmp_path / "relative")
    made.edit_json(relative / "adapter_config.json", base_model_name_or_path="./base/")
    merge_checkpoints([world["lora1"], relative], 0.5, tmp_path / "m")
    moved = made.copy(world["lora2"], tmp_path / "moved")
    made.edit_json(moved / "adapter_config.json", base_model_name_or_path="/gone/base")
    merge_checkpoints([world["lora1"], moved], 0.5, tmp_path / "m2", base=world["base"])


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_variants_of_lora(world, tmp_path, refused, lora, message):
    """Their difference from the base is not α/r · B·A."""
    adapter = made.make_adapter(tmp_path / "a", world["base"], seed=1, r=2, target_modules=["q_proj"])
    made.edit_json(adapter / "adapter_config.json", **lora)
    refused(ValueError, message, world["lora1"], adapter)
    refused(ValueError, message, world["lora1"], adapter, format="adapter")


def test_an_adapter_without_base_name_or_of_another_kind(world, tmp_path, refused):
    nameless = made.copy(world["lora1"], tmp_path / "nameless")
    made.edit_json(nameless / "adapter_config.json", base_model_name_or_path=None)
    refused(ValueError, r"pass it \(base=", nameless)
    stacked = made.copy(world["lora1"], tmp_path / "stacked")
    made.edit_json(stacked / "adapter_config.json", base_model_name_or_path=str(world["lora2"]))
    refused(
        ValueError, r"stacked names .* as its base model, which is an adapter itself: save that one", stacked
    )
    merge_checkpoints([nameless, world["lora1"]], 0.5, tmp_path / "m", base=world["base"])
    other = made.copy(world["lora1"], tmp_path / "other")
    (other / "adapter_config.json").write_text(
        json.dumps({"peft_type": "IA3", "base_model_name_or_path": str(world["base"])})
    )
    refused(ValueError, "only plain LoRA", world["lora1"], other)


def test_an_adapter_that_does_not_fit(world, tmp_path, refused):
    """A rank that the configuration does not know, a layer that the base does not have, a lost half."""
    adapter = "adapter_model.safetensors"
    rank = made.copy(world["lora1"], tmp_path / "rank")
    made.edit_json(rank / "adapter_config.json", r=3)
    refused(ValueError, "does not fit.*has shape", rank, world["lora2"])

    key = "base_model.model.decoder.model.decoder.layers.0.fc1.lora_A.weight"
    layer = made.copy(world["lora1"], tmp_path / "layer")

    def move(weights):
        for half in "AB":
            name = key.replace("lora_A", f"lora_{half}")
            weights[name.replace("layers.0", "layers.9")] = weights.pop(name)

    edit_weights(layer, move, adapter)
    refused(ValueError, "are not part of it.*layers.9", layer, world["lora2"])

    half = made.copy(world["lora1"], tmp_path / "half")
    edit_weights(half, lambda weights: weights.pop(key), adapter)
    refused(ValueError, r"lacks 1 tensor\(s\).*fc1\.lora_A", half, world["lora2"])

    lost = made.copy(world["lora1"], tmp_path / "lost")
    edit_weights(lost, lambda w: [w.pop(key.replace("_A", half)) for half in ("_A", "_B")], adapter)
    refused(ValueError, r"lacks 2 tensor\(s\).*fc1\.lora", lost, world["lora2"])


# ---- damaged files


def test_truncated_files(world, tmp_path, refused):
    """Every length short of the whole file is noticed before a byte is written, also one byte."""
    for kept in (0, 5, 100, 3000, -1):
        other = made.copy(world["full2"], tmp_path / f"cut{kept}")
        content = (other / made.MODEL).read_bytes()
        (other / made.MODEL).write_bytes(content[:kept])
        refused(ValueError, "truncated|unreadable", world["full1"], other)
        if kept:
            cut = made.copy(world["lora2"], tmp_path / f"cut-adapter{kept}")
            content = (cut / "adapter_model.safetensors").read_bytes()
            (cut / "adapter_model.safetensors").write_bytes(content[:kept])
            refused(ValueError, "truncated|unreadable", world["lora1"], cut)


def test_hostile_headers(tmp_path):
    """Offsets that overlap, run backwards or point outside must not read other bytes than the tensor's
    own."""

    def file(header):
        text = json.dumps(header).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        return path

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert _read_header(file({"a": entry, "b": entry | {"data_offsets": [8, 16]}})).keys() == {"a", "b"}
    for wrong in (
        {"a": entry, "b": entry | {"data_offsets": [4, 12]}},
        {"a": entry | {"data_offsets": [8, 16]}, "b": entry | {"data_offsets": [8, 16]}},
        {"a": entry | {"data_offsets": [-8, 0]}, "b": entry | {"shape": [4], "data_offsets": [0, 16]}},
        {"a": entry | {"shape": [-2]}},
        {"a": entry | {"dtype": "F7"}},
        {"a": {"dtype": "F32"}},
        {"a": entry | {"shape": [4], "data_offsets": [0, 8]}},
        [1, 2],
    ):
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            _read_header(file(wrong))


def test_missing_pieces(world, tmp_path, refused):
    other = made.copy(world["full2"], tmp_path / "tensor")
    edit_weights(other, lambda weights: weights.pop("decoder.lm_heads.2.weight"))
    refused(ValueError, r"lacks 1 tensor.*decoder\.lm_heads\.2\.weight", world["full1"], other)

    other = made.copy(world["full2"], tmp_path / "extra")
    edit_weights(other, lambda weights: weights.update({"decoder.lm_heads.4.weight": torch.zeros(16, 16)}))
    refused(ValueError, r"not part of it, e\.g\. decoder\.lm_heads\.4\.weight", world["full1"], other)

    other = made.copy(world["full2"], tmp_path / "shard")
    (other / made.MODEL).unlink()
    index = {"weight_map": {"decoder.lm_heads.2.weight": "model-00001-of-00002.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(FileNotFoundError, "model-00001-of-00002", world["full1"], other)

    for content in ("{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": "../b.safetensors"}}'):
        (other / "model.safetensors.index.json").write_text(content)
        refused(ValueError, r"model\.safetensors\.index\.json", world["full1"], other)

    other = made.copy(world["full2"], tmp_path / "weights")
    (other / made.MODEL).unlink()
    refused(FileNotFoundError, r"no model\.safetensors", world["full1"], other)
    torch.save({}, other / "pytorch_model.bin")
    refused(ValueError, r"pickle \(pytorch_model\.bin\)", world["full1"], other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers(world, tmp_path, refused, value):
    """Named: which checkpoint, which tensor; in a full model, in an adapter, in either output format."""
    other = made.copy(world["full2"], tmp_path / "full")
    name = "decoder.model.decoder.layers.1.fc2.weight"
    edit_weights(other, lambda weights: weights[name][0].fill_(value))
    text = refused(ValueError, "NaN or infinite", world["full1"], other)
    assert name in text and str(other) in text
    adapter = made.copy(world["lora2"], tmp_path / "adapter")
    key = "base_model.model.decoder.model.decoder.layers.0.self_attn.q_proj.lora_B.weight"
    edit_weights(adapter, lambda weights: weights[key][0].fill_(value), "adapter_model.safetensors")
    for options in ({}, {"format": "adapter"}):
        text = refused(ValueError, "NaN or infinite", world["lora1"], adapter, **options)
        assert "layers.0.self_attn.q_proj" in text and str(adapter) in text


def test_overflow_is_not_blamed_on_training(world, tmp_path, refused):
    other = made.copy(world["full2"], tmp_path / "big")
    edit_weights(other, lambda weights: weights["enc_to_dec_proj.bias"].fill_(1e6))
    refused(ValueError, "overflows torch.float16", world["full1"], other, dtype="float16")


# ---- the output


def test_an_output_that_exists(world, tmp_path):
    """Neither a folder (also an empty one), nor a file, nor a dangling link is replaced."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(FileExistsError, match="exists already"):
            merge_checkpoints([world["full1"], world["full2"]], 0.5, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_no_space_is_seen_before_writing(world, tmp_path, refused, monkeypatch):
    """The size is known beforehand: 100 kB short is short."""
    size = (world["full1"] / made.MODEL).stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=size // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(OSError, "are needed and .* free some space", world["full1"], world["full2"])


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_merge_that_breaks_off_leaves_nothing(world, tmp_path, monkeypatch, fault):
    """Disk full or Ctrl-C half-way through the file: neither the output nor its temporary stays."""
    from diverse_cfg.merging.experts import Experts

    interpolate, calls = Experts.interpolate, []

    def breaking(self, name, *args):
        calls.append(name)
        if len(calls) == 50:
            assert len(list(tmp_path.iterdir())) == 1, "it is being written by now"
            raise fault
        return interpolate(self, name, *args)

    monkeypatch.setattr(Experts, "interpolate", breaking)
    with pytest.raises(type(fault)) as caught:
        merge_checkpoints([world["full1"], world["full2"]], 0.5, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    if isinstance(fault, OSError):
        assert str(tmp_path / "m") in str(caught.value)


def test_an_output_that_appears_meanwhile(world, tmp_path, monkeypatch):
    """Two merges into one folder: the second to finish must not replace the first."""
    from diverse_cfg.merging import merge

    write = merge.write_provenance

    def meanwhile(folder, provenance):
        (tmp_path / "m").mkdir()
        return write(folder, provenance)

    monkeypatch.setattr(merge, "write_provenance", meanwhile)
    with pytest.raises(FileExistsError):
        merge_checkpoints([world["full1"], world["full2"]], 0.5, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert list((tmp_path / "m").iterdir()) == []


def test_nobody_has_a_tokenizer(world, tmp_path, refused):
    folders = []
    for name in ("full1", "full2"):
        folders.append(made.copy(world[name], tmp_path / name))
        (folders[-1] / "tokenizer.json").unlink()
    refused(ValueError, "tokenizer", *folders)
    merge_checkpoints(folders, 0.5, tmp_path / "m", base=world["base"])
    assert (tmp_path / "m" / "tokenizer.json").is_file()


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"dtype": torch.int8}, {"format": "gguf"}])
def test_unknown_options(world, refused, option):
    refused(ValueError, next(iter(option)), world["full1"], world["full2"], **option)
