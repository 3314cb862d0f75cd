"""What is no text-conditioned MusicGen is refused by name, with what to do, before anything is unpickled or
built."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diverse_cfg.merging import inspect_checkpoint
from diverse_cfg.policies.audiocraft import export_audiocraft, from_audiocraft, load_audiocraft
from diverse_cfg.policies.audiocraft.importing import INSTALL, import_audiocraft
from diverse_cfg.policies.loading import load_policy, load_processor
from tests.faults import without_privileges
from tests.policies.audiocraft_world import edit
from tests.tiny import tiny_config, tiny_musicgen, tiny_processor

DATA = Path(__file__).parent / "data" / "audiocraft"
ROOT = Path(__file__).parents[2]
LM, CODEC = "state_dict.bin", "compression_state_dict.bin"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint to be spoilt."""
    return Path(shutil.copytree(DATA / "mono", tmp_path / "checkpoint"))


T5 = "t5: {name: t5-small, finetune: false, word_dropout: 0.3, normalize_text: false}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("solver: musicgen", "solver: audiogen", "holds AudioGen, not MusicGen"),
        ("lm_model: transformer_lm", "lm_model: transformer_lm_magnet", "holds MAGNeT, not MusicGen"),
        ("solver: musicgen", "solver: magnet", "holds MAGNeT"),
        ("lm_model: transformer_lm", "lm_model: mamba", "language model 'mamba'"),
        (T5, T5 + "\n  self_wav: {model: chroma_stem, chroma_stem: {n_chroma: 12}}", "MusicGen-Melody"),
        (T5, T5 + "\n  self_wav: {model: style, style: {model_name: mert}}", "MusicGen-Style"),
        ("model: t5\n", "model: clap\n", "conditioned on CLAP"),
        ("model: t5\n", "model: lut\n", "conditioned on {'description': 'lut'}"),
        ("normalize_text: false", "normalize_text: true", "spaCy"),
        ("prepend: []", "prepend: [description]", "plain cross-attention"),
        ("modeling: delay", "modeling: unroll", "arranges its codebooks as 'unroll'"),
        ("delays: [0, 1, 2, 3]", "delays: [0, 2, 4, 6]", r"delays them by \[0, 1, 2, 3\]"),
        ("positional_embedding: sin", "positional_embedding: rope", "positional_embedding='rope'"),
        ("norm_first: true", "norm_first: false", "norm_first=False"),
        ("layer_scale: null", "layer_scale: 0.1", "layer_scale=0.1"),
        ("two_step_cfg: false", "two_step_cfg: false\n  layer_drop: 0.1", "layer_drop=0.1"),
        ("per_timestep: false", "per_timestep: true", "per_timestep"),
        ("num_layers: 2", "num_layers: 3", r"it lacks transformer\.layers\.2\."),
        ("num_layers: 2", "num_layers: 1", r"nothing asks for decoder\.model\.decoder\.layers\.1"),
        ("hidden_scale: 4", "hidden_scale: 2", r"linear1\.weight is \(64, 16\) instead of \(32, 16\)"),
        ("n_q: 4", "n_q: '${number}'", r"refers to \$\{number\}, which cannot be resolved"),
        ("card: '${codec_card}'", "card: 17", "models 17 codes per codebook, but the codec .* has 16"),
        ("sample_rate: 3200", "sample_rate: 32000", "trained on 32000 Hz, but the codec .* is for 3200 Hz"),
        (
            "compression_model_n_q: null",
            "compression_model_n_q: 2",
            "models 4 codebooks, .* of which 2 are used",
        ),
    ],
)
def test_other_language_models(folder, old, new, message):
    if "per_timestep" in new:
        edit(folder / LM, ("use: false", "use: true"), ("delays: [0, 1, 2, 3]", "delays: [0, 0, 1, 1]"))
    edit(folder / LM, (old, new))
    with pytest.raises(ValueError, match=message) as error:
        load_audiocraft(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("compression_model: encodec", "compression_model: dac", "only EnCodec is supported"),
        ("norm: weight_norm", "norm: time_group_norm", r"seanet\.norm='time_group_norm'"),
        ("renormalize: false", "renormalize: true", "renormalize=True"),
        ("\nchannels: 1", "\nchannels: 2", r"encodec\.channels=2"),
        ("lstm: 2", "lstm: 0", "no LSTM"),
        ("final_activation: null", "final_activation: Tanh", "final_activation='Tanh'"),
        ("encoder: {}", "encoder: {n_filters: 4}", "sizes encoder and decoder differently"),
        ("n_q: 4", "n_q: 3", r"models 4 codebooks, but the codec .* has 3"),
        ("bins: 16", "bins: 8", r"models 16 codes per codebook, but the codec .* has 8"),
    ],
)
def test_codecs_that_do_not_fit(folder, old, new, message):
    edit(folder / CODEC, (old, new))
    with pytest.raises(ValueError, match=message):
        load_audiocraft(folder)


def test_a_melody_conditioner_that_only_its_weights_tell(folder):
    edit(
        folder / LM,
        state=lambda s: s.update(
            {"condition_provider.conditioners.self_wav.output_proj.weight": torch.ones(2)}
        ),
    )
    with pytest.raises(ValueError, match="melody conditioner"):
        load_audiocraft(folder)


class Danger:
    """Unpickled by a careless reader, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_objects_are_never_unpickled(folder, tmp_path, old_format):
    package = torch.load(folder / LM, weights_only=True) | {"extra": Danger(tmp_path / "mark")}
    torch.save(package, folder / LM, _use_new_zipfile_serialization=not old_format)
    for load in (load_audiocraft, load_policy, inspect_checkpoint):
        with pytest.raises(ValueError, match="tensors and strings only"):
            load(folder)
    assert not (tmp_path / "mark").exists()


def test_raw_training_checkpoints(folder, tmp_path):
    """With OmegaConf's objects inside, without them, and as the folder of a run."""
    package = torch.load(folder / LM, weights_only=True)
    raw = {"best_state": {"model": package["best_state"]}, "optimizer": {}, "xp.cfg": package["xp.cfg"]}
    torch.save(raw, folder / LM)
    with pytest.raises(ValueError, match=r"raw training checkpoint: export it .*export_lm"):
        load_policy(folder)
    run = tmp_path / "xps" / "1234abcd"
    run.mkdir(parents=True)
    torch.save(raw, run / "checkpoint.th")
    for load in (load_audiocraft, load_policy, load_processor, inspect_checkpoint):
        with pytest.raises(ValueError, match=r"checkpoint\.th holds pickled objects.*export_lm"):
            load(run)


def test_raw_training_checkpoints_with_omegaconf_inside(folder):
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf (extra audiocraft) is not installed")
    package = torch.load(folder / LM, weights_only=True)
    torch.save(package | {"xp.cfg": omegaconf.OmegaConf.create(package["xp.cfg"])}, folder / LM)
    with pytest.raises(ValueError, match="raw training checkpoint, whose pickled objects are never loaded"):
        load_policy(folder)


@pytest.mark.parametrize("name", [LM, CODEC])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 0.99])
def test_truncated_files(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{name} is (truncated|no AudioCraft export.*damaged).*copy"):
        load_policy(folder)


def test_a_text_encoder_of_which_a_tensor_is_missing(folder):
    """T5 beside the checkpoint: what is not there is not filled with random numbers."""
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights.pop("encoder.block.0.layer.0.SelfAttention.q.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder lacks 1 tensor.*SelfAttention\.q\.weight"):
        load_policy(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="privileges are Linux's")
def test_files_that_may_not_be_read(folder):
    (folder / LM).chmod(0)
    with without_privileges(), pytest.raises(PermissionError, match=rf"{LM} may not be read.*permissions"):
        load_policy(folder)


def test_files_that_hold_something_else(folder):
    torch.save([1, 2], folder / LM)
    with pytest.raises(ValueError, match="holds a list"):
        load_audiocraft(folder)
    torch.save({"weights": torch.ones(1)}, folder / LM)
    with pytest.raises(ValueError, match=r"lacks 'best_state' or 'xp.cfg' \(it has weights\)"):
        load_audiocraft(folder)


def test_half_a_checkpoint_and_neither_format(folder, tmp_path):
    (folder / CODEC).rename(tmp_path / "codec")
    with pytest.raises(ValueError, match=rf"has {LM} but no {CODEC}.*export_pretrained_compression_model"):
        load_policy(folder)
    (folder / LM).unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*AudioCraft"):
        load_policy(folder)
    with pytest.raises(ValueError, match="no AudioCraft checkpoint: it has neither"):
        load_audiocraft(folder)
    (tmp_path / "codec").rename(folder / CODEC)
    with pytest.raises(ValueError, match="it is a codec, not a MusicGen"):
        load_policy(folder)
    with pytest.raises(ValueError, match="neither"):
        load_audiocraft("nobody/nothing")


def test_a_pointer_to_a_codec_that_is_not_here(folder):
    for name, message in (
        (
            "facebook/encodec_32khz",
            r"names the codec facebook/encodec_32khz.*hf download facebook/encodec_32khz",
        ),
        ("dac_44khz", "DAC"),
        (CODEC, "points to itself"),
    ):
        torch.save({"pretrained": name, "exported": True}, folder / CODEC)
        with pytest.raises(ValueError, match=message):
            load_policy(folder)


def test_a_text_encoder_that_is_not_here(folder, tmp_path, monkeypatch):
    """Offline, the message names all three ways out; each of them works."""
    monkeypatch.chdir(tmp_path)
    edit(folder / LM, ("name: t5-small", "name: t5-base"))
    (folder / "text_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"T5 't5-base'.*hf download t5-base.*text_encoder.*--text-encoder"):
        load_policy(folder)
    load_audiocraft(folder, text_encoder=tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "t5-base")  # as for AudioCraft itself
    load_policy(folder)
    shutil.rmtree(tmp_path / "t5-base")
    shutil.copytree(tmp_path / "elsewhere", folder / "text_encoder")
    load_policy(folder)


def test_exports_that_audiocraft_could_not_hold(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = tiny_musicgen(), tiny_processor()
    with pytest.raises(ValueError, match="text encoder is none that AudioCraft knows"):
        export_audiocraft(model, tmp_path / "a")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        export_audiocraft(wrapped, tmp_path / "a", processor=processor)
    with pytest.raises(ValueError, match="unmerged adapters"):
        export_audiocraft(model, tmp_path / "a", processor=processor)
    wrapped.unload()
    for part, name, value, message in (
        ("decoder", "activation_function", "relu", "activation_function='relu'"),
        ("audio_encoder", "norm_type", "time_group_norm", "norm_type='time_group_norm'"),
        ("audio_encoder", "codebook_size", 8, "8 codes, its decoder 16"),
    ):
        setattr(getattr(model.config, part), name, value)
        with pytest.raises(ValueError, match=re.escape(message)):
            export_audiocraft(model, tmp_path / "a", processor=processor)
        model.config = tiny_config()
    assert not (tmp_path / "a").exists(), "nothing is written before everything is checked"
    export_audiocraft(model, tmp_path / "a", processor=processor)
    with pytest.raises(FileExistsError, match=LM):
        export_audiocraft(model, tmp_path / "a", processor=processor)


def test_live_objects_that_are_not_enough(monkeypatch):
    """An LMModel has no codec; the class is recognised without importing audiocraft."""
    kind = type("LMModel", (torch.nn.Module,), {"__module__": "audiocraft.models.lm"})
    for load in (load_policy, from_audiocraft):
        with pytest.raises(ValueError, match=r"LMModel alone has no codec.*\(lm, compression_model\)"):
            load(kind())
    with pytest.raises(ValueError, match=r"expected a pair \(LMModel, compression_model\)"):
        from_audiocraft((kind(), kind()))


def test_without_audiocraft_the_error_says_what_to_run(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "audiocraft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape(INSTALL)):
        import_audiocraft()
    assert INSTALL.endswith(" && pip install --no-deps audiocraft==1.3.0")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.findall(r'"([^"]+)"', INSTALL) == project["optional-dependencies"]["audiocraft"]
