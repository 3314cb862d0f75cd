"""Bad folders and the readers of models: each reader refuses each of them in one line that names it."""

import json
import shutil
import sys
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from diverse_cfg.cli import main
from diverse_cfg.merging import inspect_checkpoint, load_slider, merge_checkpoints, merge_sweep
from diverse_cfg.policies.checkpoints import open_checkpoint
from diverse_cfg.policies.loading import load_policy, load_processor, torch_device
from diverse_cfg.policies.policy import require_prompts
from diverse_cfg.policies.sampler.rollout import fast_generate
from diverse_cfg.policies.stored import FullCheckpoint
from diverse_cfg.publishing.plan import check_loads
from tests import checkpoints as made
from tests.faults import without_privileges
from tests.tiny import tiny_processor
from tests.training import tiny_trainer

ADAPTER = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made.make_world(tmp_path_factory.mktemp("bad"))


def run(*arguments):
    """A command as a function: what it would print after `diverse-cfg: error:` is raised."""

    def call(folder, world, output):
        parser_error = main(
            ["--debug", *(a.format(folder=folder, base=world["base"], output=output) for a in arguments)]
        )
        assert parser_error == 0

    return call


READERS = {
    "load_policy": lambda folder, world, output: load_policy(folder),
    "load_processor": lambda folder, world, output: load_processor(folder),
    "load_slider": lambda folder, world, output: load_slider(world["base"], [folder, world["full2"]]),
    "merge": lambda folder, world, output: merge_checkpoints([folder, world["full2"]], None, output),
    "inspect": lambda folder, world, output: inspect_checkpoint(folder),
    "publish": lambda folder, world, output: check_loads(folder),
    "train": lambda folder, world, output: tiny_trainer(output, str(folder), guidance_scale=1.0),
    "convert": run("convert", "{folder}", "--to", "audiocraft", "--output", "{output}"),
    "generate": run(
        "generate", "--model", "{folder}", "--prompt", "a", "--seconds", "0.1", "--output", "{output}"
    ),
}
ON_A_BASE = {
    "load_policy(adapter=)": lambda folder, world, output: load_policy(world["base"], adapter=folder),
    "load_policy(live, adapter=)": lambda folder, world, output: load_policy(
        load_policy(world["base"]), adapter=folder
    ),
    "generate --adapter": run(
        *("generate", "--model", "{base}", "--adapter", "{folder}", "--prompt", "a"),
        *("--seconds", "0.1", "--output", "{output}"),
    ),
}


def write(name, content):
    def edit(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)

    return edit


def lose(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def directory(name):
    def edit(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


def settings(name, part=None, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        (content[part] if part else content).update(changes)
        (folder / name).write_text(json.dumps(content))

    return edit


def tensors(name, change):
    def edit(folder):
        save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})

    return edit


def without(text):
    return lambda weights: {name: tensor for name, tensor in weights.items() if text not in name}


def renamed(old, new):
    return lambda weights: {name.replace(old, new, 1): tensor for name, tensor in weights.items()}


def cut(text):
    return lambda w: {k: v[..., :-1].contiguous() if text in k else v for k, v in w.items()}


def pickled(name, pickle):
    def edit(folder):
        (folder / name).unlink()
        torch.save({}, folder / pickle)

    return edit


def outside(folder):
    shutil.move(folder / made.MODEL, folder.parent / "elsewhere.safetensors")
    names = load_file(folder.parent / "elsewhere.safetensors").keys()
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))


def nonsense_index(folder):
    (folder / made.MODEL).unlink()
    (folder / INDEX).write_text('{"weight_map": [1]}')


_TEXT = {"load_policy", "load_slider"}  # they do without a tokenizer; a merge takes it from any parent
# name: (what is done to a folder, what the message must name, who does not read that if not `load_processor` alone)
FULL = {
    "truncated weights": (truncate(made.MODEL), made.MODEL),
    "weights of another format": (write(made.MODEL, b"PK\3\4" * 99), made.MODEL),
    "no weights": (lose(made.MODEL), made.MODEL),
    "weights are a folder": (directory(made.MODEL), made.MODEL),
    "a pickle": (pickled(made.MODEL, "pytorch_model.bin"), r"pytorch_model\.bin.*never read"),
    "a tensor is missing": (
        tensors(made.MODEL, without("decoder.lm_heads.1.")),
        r"decoder\.lm_heads\.1\.weight",
    ),
    "a tensor of the codec is missing": (
        tensors(made.MODEL, without("quantizer.layers.0")),
        r"audio_encoder\.quantizer\.layers\.0",
    ),
    "a tensor too many": (
        tensors(made.MODEL, lambda w: w | {"decoder.extra": torch.ones(1)}),
        r"decoder\.extra",
    ),
    "another shape": (tensors(made.MODEL, cut("layers.0.fc1.weight")), r"fc1\.weight"),
    "quantised weights": (
        tensors(made.MODEL, lambda w: {k: v.char() if "fc1" in k else v for k, v in w.items()}),
        r"holds int8 in decoder\..*fc1\.weight: another program quantised it",
    ),
    "fewer layers": (settings("config.json", "decoder", num_hidden_layers=3), r"layers\.2"),
    "fewer codebooks": (settings("config.json", "decoder", num_codebooks=5), r"embed_tokens\.4"),
    "no layers": (settings("config.json", "decoder", num_hidden_layers=-1), "num_hidden_layers=-1", set()),
    "a count that is a word": (
        settings("config.json", "decoder", num_hidden_layers="two"),
        "config.json",
        set(),
    ),
    "a half-written configuration": (write("config.json", '{"model_type": "mus'), "config.json", set()),
    "a configuration of no model": (
        settings("config.json", model_type=None),
        r"config\.json does not say which model it is of \(model_type=None\): copy",
        set(),
    ),
    "a configuration that is a list": (write("config.json", "[]"), "config.json", set()),
    "a configuration of bytes": (write("config.json", b"\xff\xfe\0"), "config.json", set()),
    "the configuration is a folder": (directory("config.json"), "config.json", set()),
    "half-written generation settings": (
        write("generation_config.json", '{"do_sample": tr'),
        "generation_config.json",
    ),
    "generation settings of another kind": (
        write("generation_config.json", '{"model_type": "musicgen", "decoder": {}}'),
        "generation_config.json holds model_type",
    ),
    "generation settings that are words": (
        settings("generation_config.json", temperature="hot"),
        "generation_config.json.*temperature='hot'",
    ),
    "generation settings are a folder": (directory("generation_config.json"), "generation_config.json"),
    "a half-written processor": (write("processor_config.json", '{"feature'), "broken", _TEXT),
    "provenance is a folder": (directory("diverse_cfg.json"), "diverse_cfg.json"),
    "an index that leads elsewhere": (outside, r"index\.json.*\.\./elsewhere"),
    "an index without names": (nonsense_index, "index.json"),
    "no tokenizer": (lose("tokenizer.json"), "tokenizer.json", _TEXT | {"merge"}),
    "a tokenizer of something else": (write("tokenizer.json", "{}"), "broken", _TEXT),
    "no processor": (lose("processor_config.json"), "processor_config.json", _TEXT | {"merge"}),
    "broken provenance": (write("diverse_cfg.json", "{"), "diverse_cfg.json"),
}
LORA = {
    "truncated adapter": (truncate(ADAPTER), ADAPTER),
    "adapter of another format": (write(ADAPTER, b"<html>" * 99), ADAPTER),
    "no adapter weights": (lose(ADAPTER), ADAPTER),
    "adapter weights are a folder": (directory(ADAPTER), ADAPTER),
    "a pickled adapter": (pickled(ADAPTER, "adapter_model.bin"), r"adapter_model\.bin.*never read"),
    "the prefix of torch.compile": (
        tensors(ADAPTER, renamed("base_model.", "_orig_mod.base_model.")),
        "prefix of a wrapper",
    ),
    "the prefix of an adapter": (
        tensors(ADAPTER, renamed("lora_A.weight", "lora_A.default.weight")),
        "prefix of a wrapper",
    ),
    "some of the keys": (tensors(ADAPTER, without("layers.1.fc1.lora")), r"layers\.1\.fc1\.lora"),
    "quantised factors": (
        tensors(ADAPTER, lambda w: {k: v.int() for k, v in w.items()}),
        r"holds int32 in base_model\..*lora",
    ),
    "factors of another rank": (settings("adapter_config.json", r=5), "has shape"),
    "a rank that is a word": (settings("adapter_config.json", r="two"), "adapter_config.json"),
    "half-written settings": (write("adapter_config.json", '{"r": 4, '), "adapter_config.json"),
    "settings that are a list": (write("adapter_config.json", "[1]"), "adapter_config.json"),
    "an unknown kind": (settings("adapter_config.json", peft_type="NEW"), "adapter_config.json"),
    "a base that is a number": (
        settings("adapter_config.json", base_model_name_or_path=3),
        "base_model_name_or_path=3",
    ),
}


def cases():
    """`load_policy` reads every kind, the others every third in turn: all of them take a minute."""
    for kinds, source, readers in ((FULL, "full1", READERS), (LORA, "lora1", READERS | ON_A_BASE)):
        for number, (kind, (edit, message, *spared)) in enumerate(kinds.items()):
            able = [name for name in readers if name not in (spared[0] if spared else {"load_processor"})]
            for position, reader in enumerate(able):
                if reader == "load_policy" or (number + position) % 3 == 0:
                    yield pytest.param(source, edit, message, readers[reader], id=f"{reader}-{kind}")


@pytest.mark.parametrize(("source", "edit", "message", "read"), cases())
def test_bad_folders_are_refused_in_one_line(world, tmp_path, source, edit, message, read):
    folder = made.copy(world[source], tmp_path / "broken")
    edit(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read(folder, world, tmp_path / "output")
    text = str(caught.value)
    assert "broken" in text and "\n" not in text and len(text) < 700
    assert not isinstance(caught.value, json.JSONDecodeError | UnicodeDecodeError)
    assert not (tmp_path / "output").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="privileges are Linux's")
def test_what_may_not_be_read_is_named_with_its_remedy(world, tmp_path):
    """Weights, a configuration, a folder; each by a reader of its own."""
    for number, (name, source) in enumerate(
        [(made.MODEL, "full1"), ("config.json", "full1"), (ADAPTER, "lora1"), (".", "full1")]
    ):
        folder = made.copy(world[source], tmp_path / f"broken{number}")
        (folder / name).chmod(0)
        for read in (load_policy, inspect_checkpoint):
            with (
                without_privileges(),
                pytest.raises(PermissionError, match="change its permissions") as caught,
            ):
                read(folder)
            assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)
        (folder / name).chmod(0o700)


ON_ANOTHER_BASE = {
    **ON_A_BASE,
    "load_slider": lambda folder, world, output: load_slider(world["base"], [folder, world["full2"]]),
    "merge": lambda folder, world, output: merge_checkpoints(
        [folder, world["full2"]], None, output, base=world["base"]
    ),
    "inspect": lambda folder, world, output: inspect_checkpoint(folder, base=world["base"]),
}


@pytest.mark.parametrize("reader", ON_ANOTHER_BASE)
def test_an_adapter_belongs_to_the_base_that_it_names(world, tmp_path, reader):
    """One weight of the named base differs: refused. The same weights elsewhere, in half precision too: welcome."""
    folder = made.copy(world["lora1"], tmp_path / "broken")
    named = made.copy(world["base"], tmp_path / "named")
    made.edit_json(folder / "adapter_config.json", base_model_name_or_path=str(named))
    read = ON_ANOTHER_BASE[reader]
    read(folder, world, tmp_path / "first")

    tensors(made.MODEL, lambda w: {k: v.bfloat16() if v.is_floating_point() else v for k, v in w.items()})(
        named
    )
    read(folder, world, tmp_path / "second")

    name = "decoder.lm_heads.2.weight"
    tensors(made.MODEL, lambda w: w | {name: w[name] + 1})(named)
    with pytest.raises(ValueError, match=rf"broken.*named.*another model \({name} differs\).*its own base"):
        read(folder, world, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_an_adapter_whose_base_is_gone_is_used_with_a_warning(world, tmp_path):
    folder = made.copy(world["lora1"], tmp_path / "adapter")
    made.edit_json(folder / "adapter_config.json", base_model_name_or_path="/gone/base")
    with pytest.warns(UserWarning, match="/gone/base.*cannot be checked"):
        load_policy(world["base"], adapter=folder)


def test_a_record_of_an_earlier_version_is_still_read(world, tmp_path):
    """Fault: adapters and sweeps of before count as made of other weights."""
    adapter = made.copy(world["lora1"], tmp_path / "lora")
    record = FullCheckpoint(world["base"], world["base"]).fingerprint("0123456789abcdef")
    assert len(record) == 16
    made.edit_json(adapter / "diverse_cfg.json", training={"base_fingerprint": record})
    assert open_checkpoint(adapter).fingerprint().startswith("sha256:")
    made.edit_json(adapter / "diverse_cfg.json", training={"base_fingerprint": record[::-1]})
    with pytest.raises(ValueError, match="weights have changed since"):
        open_checkpoint(adapter)
    sweep = [[world["lora1"], world["lora2"]], [0.5], tmp_path / "sweep"]
    [folder] = merge_sweep(*sweep)
    recipe = yaml.safe_load((folder / "merge.yaml").read_text())
    experts = [open_checkpoint(world[name]) for name in ("lora1", "lora2", "base")]
    recipe["fingerprints"] = [expert.fingerprint("0123456789abcdef") for expert in experts]
    (folder / "merge.yaml").write_text(yaml.safe_dump(recipe))
    assert merge_sweep(*sweep) == [folder]


def test_weights_that_lie_there_twice(world, tmp_path):
    """Fault: which of two sets of weights is read, nobody can tell."""
    folder = made.copy(world["base"], tmp_path / "base")
    (folder / INDEX).write_text('{"weight_map": {}}')
    shutil.copy(folder / made.MODEL, folder / "model-00001-of-00001.safetensors")
    with pytest.warns(
        UserWarning, match=r"weights twice, in model\.safetensors and in shards such as model-0"
    ):
        open_checkpoint(folder)


def test_a_model_that_was_quantised(world, tmp_path):
    """Fault: names no folder, and tells to save another."""
    folder = made.copy(world["base"], tmp_path / "small")
    made.edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    for load in (load_policy, open_checkpoint):
        with pytest.raises(
            ValueError, match=r"small was quantised .*: use the checkpoint that it was made of"
        ):
            load(folder)


def test_an_adapter_of_nan_is_not_its_bases_fault(world, tmp_path, refused):
    adapter = made.copy(world["lora1"], tmp_path / "lora")
    weights = load_file(adapter / ADAPTER)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] * float("nan")}, adapter / ADAPTER)
    said = refused("convert", adapter, "--to", "audiocraft", "--output", tmp_path / "o")
    assert said.startswith(f"{adapter} has NaN")
    with pytest.raises(ValueError, match=r"lora has NaN .* in base_model\..*lora_"):
        open_checkpoint(adapter).require_finite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fast_generate("/no", None, num_frames=4),
            "prompts must be a non-empty list of texts, got None",
        ),
        (lambda: fast_generate("/no", "a", num_frames=4, weights="x"), "weights='x' must be what RolloutW"),
        (
            lambda: fast_generate("/no", "a", num_frames=4, dtype=torch.int8),
            "dtype=torch.int8 must be a floating",
        ),
        (lambda: load_policy("/no", torch_dtype=torch.int8), "torch_dtype=torch.int8 must be a floating"),
        (
            lambda: load_slider("/no", "ab", torch_dtype=torch.int8),
            "torch_dtype=torch.int8 must be a floating",
        ),
        (lambda: load_slider("/no", "ab", device="foo"), "device='foo' cannot be used"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_loaded(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_prompts_that_the_tokenizer_cannot_read_are_said_once():
    """Fault: every such prompt is the same to the model, and nothing says so."""
    with pytest.warns(UserWarning, match=r"prompt 1 \('春の歌'\) has no character .*, nor have 1 others"):
        require_prompts(["a calm song", "春の歌", "夏"], tiny_processor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_prompts(["夏", "a 春 song"], tiny_processor())


def test_a_device_that_is_not_here(world, tmp_path):
    for name in ("xyz", "cuda:77", "cpu:cpu"):
        with pytest.raises(ValueError, match=f"device='{name}' cannot be used.*leave it out"):
            torch_device(name)
    with pytest.raises(ValueError, match="device='xyz' cannot be used"):
        run(
            *("generate", "--model", "{folder}", "--prompt", "a", "--output", "{output}", "--device", "xyz"),
        )(world["base"], world, tmp_path / "output")
    with pytest.raises(ValueError, match="device='xyz' cannot be used"):
        run(
            *("train-embedder", "--model", "{folder}", "--prompts", "nano", "--output", "{output}"),
            *("--device", "xyz"),
        )(world["base"], world, tmp_path / "output")


def test_configurations_of_older_transformers_are_no_other_architecture(world, tmp_path):
    """Up to 4.31 they held every setting of text generation; what shapes the computation still counts."""
    legacy = {
        "max_length": 20,
        "num_beams": 1,
        "prefix": None,
        "torchscript": False,
        "top_k": 50,
        "pruned_heads": {},
    }
    base = made.copy(world["base"], tmp_path / "base")
    for part in ("text_encoder", "audio_encoder", "decoder"):
        settings("config.json", part, **legacy, return_dict_in_generate=True, temperature=0.7)(base)
    merge_checkpoints([base, world["full2"]], 0.5, tmp_path / "merged")
    assert inspect_checkpoint(world["full2"], base=base)["active"]
    settings("config.json", "text_encoder", relative_attention_max_distance=64)(base)
    with pytest.raises(ValueError, match="relative_attention_max_distance"):
        merge_checkpoints([base, world["full2"]], 0.5, tmp_path / "other")
