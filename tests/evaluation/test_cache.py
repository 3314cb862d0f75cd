"""The cache: what decides a key, and files that are not what their name says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from diverse_cfg.evaluation.cache import Cache, content_digest, digest, mixture_digest, weights_digest
from tests.tiny import save_tiny


def test_a_key_does_not_depend_on_the_order_of_settings():
    assert digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_arrays_come_back(tmp_path):
    cache, description = Cache(tmp_path), {"encoder": "x", "seed": 3}
    assert cache.load("features", description) is None
    arrays = {"values": np.arange(6.0).reshape(2, 3), "batch": np.array([1, 2], dtype=np.int32)}
    cache.save("features", description, arrays)
    found = cache.load("features", description)
    assert found is not None and found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert cache.load("features", {**description, "seed": 4}) is None


def test_embeddings_of_another_encoder_are_refused(tmp_path):
    """Catches a cache that trusts file names: distances between two encoders' spaces are meaningless
    numbers."""
    cache = Cache(tmp_path)
    cache.save("features", {"encoder": "one"}, {"values": np.zeros((1, 2))})
    shutil.copy(cache.path("features", {"encoder": "one"}), cache.path("features", {"encoder": "two"}))
    with pytest.raises(ValueError, match=r"encoder='one'.*delete it"):
        cache.load("features", {"encoder": "two"})


def test_a_file_of_another_program_is_refused(tmp_path):
    path = Cache(tmp_path).path("features", {"a": 1})
    path.parent.mkdir(parents=True)
    save_file({"values": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="unknown source"):
        Cache(tmp_path).load("features", {"a": 1})


def test_a_damaged_file_is_made_again(tmp_path):
    cache = Cache(tmp_path)
    cache.save("features", {"a": 1}, {"values": np.zeros(100)})
    path = cache.path("features", {"a": 1})
    path.write_bytes(path.read_bytes()[:40])
    assert cache.load("features", {"a": 1}) is None


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    """Catches writing in place: an interruption would leave a file that looks finished."""

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("diverse_cfg.evaluation.cache.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).save("features", {"a": 1}, {"values": np.zeros(3)})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_content_of_a_model_decides_not_its_place(tmp_path):
    first = save_tiny(tmp_path / "first")
    copied = shutil.copytree(first, tmp_path / "elsewhere")
    other = save_tiny(tmp_path / "other", seed=1)
    assert content_digest(first) == content_digest(copied)
    assert content_digest(first) != content_digest(other)
    (copied / "README.md").write_text("a card changes no clip")
    (copied / "checkpoint-10").mkdir()
    shutil.copy(tmp_path / "other" / "model.safetensors", copied / "checkpoint-10")
    assert content_digest(first) == content_digest(copied)


@pytest.mark.parametrize(
    "name",
    [
        "preprocessor_config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "custom_module.py",
        "model.onnx",
    ],
)
def test_every_file_of_an_encoder_is_in_its_key(tmp_path, name):
    """Catches a list of what matters that forgets something: other mel bands, the embeddings of before."""
    (tmp_path / "config.json").write_text('{"model_type": "clap"}')
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("1")
    before = content_digest(tmp_path)
    path.write_text("2, and longer")
    assert content_digest(tmp_path) != before


def test_what_decides_no_clip_is_in_no_key(tmp_path):
    """Catches keys that change, and hours of generating again, because of a card or a log."""
    folder = Path(save_tiny(tmp_path / "model"))
    before = content_digest(folder)
    for name in ("README.md", "diverse_cfg.json", "trainer_state.json", "optimizer.pt", "training_args.bin"):
        (folder / name).write_text("{}")
    for name in ("training_curves.PNG", "samples/0.wav", ".git/config", ".cache/huggingface/x.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name in ("generation_config.json", "processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text('{"changed": true}')  # of a MusicGen, which reads no audio
    assert content_digest(folder) == before
    (folder / "added_tokens.json").write_text("{}")
    assert content_digest(folder) != before


def test_old_adapters_are_their_weights(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = save_tiny(tmp_path / "base")
    config = {"base_model_name_or_path": base, "auto_mapping": {"base_model_class": "MusicgenForCausalLM"}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.bin").write_bytes(b"one")
    before = content_digest(adapter)
    (adapter / "processor_config.json").write_text("{}")
    assert content_digest(adapter) == before
    (adapter / "adapter_model.bin").write_bytes(b"two")
    assert content_digest(adapter) != before


def test_a_model_in_memory_is_its_weights():
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    before = weights_digest(one)
    assert before != weights_digest(other)
    other.load_state_dict(one.state_dict())
    assert before == weights_digest(other)
    assert before != weights_digest(one.to(torch.bfloat16))


def test_facts_are_kept_beside_the_key(tmp_path):
    cache, description = Cache(tmp_path), {"a": 1}
    assert cache.facts("generations", description) == {}
    cache.save("generations", description, {"x": np.zeros(1)}, {"machine": "a, 2 threads"})
    assert cache.facts("generations", description) == {"machine": "a, 2 threads"}
    assert cache.load("generations", description) is not None
    cache.save("generations", description, {"x": np.zeros(1)})
    assert cache.facts("generations", description) == {}


def test_a_model_that_is_written_over_is_noticed(tmp_path):
    """Catches a hash that is remembered by path: a retrained student in the same folder is another model."""
    folder = save_tiny(tmp_path / "model")
    before = content_digest(folder)
    save_tiny(folder, seed=1)
    assert content_digest(folder) != before


def test_an_adapter_is_its_base_and_its_weights(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"lora": np.zeros(2)}, adapter / "adapter_model.safetensors")
    before = content_digest(adapter)
    save_tiny(base, seed=1)
    assert content_digest(adapter) != before


def test_a_merge_is_its_experts_and_weights(tmp_path):
    a, b = save_tiny(tmp_path / "a"), save_tiny(tmp_path / "b", seed=1)
    half = mixture_digest(((a, 0.5), (b, 0.5)))
    assert half != mixture_digest(((a, 0.25), (b, 0.75)))
    assert mixture_digest(((a, 0.25), (b, 0.75))) != mixture_digest(((a, 0.75), (b, 0.25)))
    assert mixture_digest(((a, 1.0), (b, 0.0))) == mixture_digest(((a, 1.0),)) == content_digest(a)


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        content_digest(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        content_digest("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        content_digest(tmp_path / "empty")
