"""Loading: what a policy must not bring along from its checkpoint (half precision, dropout, guidance on
top)."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MusicgenConfig

from diverse_cfg.policies.loading import is_distilled, load_policy, load_processor
from diverse_cfg.policies.musicgen.family import MUSICGEN
from diverse_cfg.policies.musicgen.model import LORA_TARGET_MODULES
from diverse_cfg.provenance import Provenance, write_provenance
from tests.tiny import PROMPTS, tiny_config, tiny_musicgen, tiny_processor


def lora(model, **settings):
    config = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False, **settings)
    return get_peft_model(model, config)


def stock_logits(model, seed=0):
    """Logits of transformers' own forward on random inputs."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tiny_processor()(text=PROMPTS, padding=True, return_tensors="pt")
    codes = torch.randint(0, 16, (len(PROMPTS) * 4, 9), generator=generator)
    with torch.no_grad():
        return model(**tokens, decoder_input_ids=codes).logits


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    """An adapter folder whose configuration names its base, and the logits it must give."""
    model = lora(load_policy(tiny_folder))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", stock_logits(model)


def test_half_precision_on_disk_is_upcast(tmp_path, tiny_folder):
    """Training in the checkpoint's float16 would lose every small update."""
    tiny_musicgen().half().save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    assert {tensor.dtype for tensor in policy.state_dict().values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert not policy.training


def test_codec_stays_in_float32(tiny_folder):
    policy = load_policy(tiny_folder, torch_dtype=torch.bfloat16)
    assert (
        policy.decoder.lm_heads[0].weight.dtype == policy.text_encoder.shared.weight.dtype == torch.bfloat16
    )
    assert {parameter.dtype for parameter in policy.audio_encoder.parameters()} == {torch.float32}


def test_every_dropout_is_off_even_in_train_mode(tiny_folder):
    """T5, attention and layers keep rates as plain floats, which `disable_dropout` of TRL does not reach."""
    policy = load_policy(tiny_folder)
    assert all(module.p == 0 for module in policy.modules() if isinstance(module, nn.Dropout))
    reference = stock_logits(policy)
    policy.train()
    assert torch.equal(stock_logits(policy), reference)


def test_base_keeps_its_guidance(tiny_folder):
    assert load_policy(tiny_folder).generation_config.guidance_scale == 3.0
    assert not is_distilled(tiny_folder)


@pytest.mark.parametrize("kind", ["student", "merge"])
def test_distilled_folder_is_not_guided_again(tiny_folder, tmp_path, kind):
    """A student folder with its base's generation config would be guided twice."""
    folder = shutil.copytree(tiny_folder, tmp_path / kind)
    write_provenance(folder, Provenance(kind=kind, guidance_scale=3.0))
    assert load_policy(folder).generation_config.guidance_scale == 1.0


def test_adapter_folder_is_merged_and_not_guided_again(adapter):
    """PEFT's own loading brings the base's guidance 3 back."""
    folder, logits = adapter
    write_provenance(folder, Provenance("student"))
    policy = load_policy(folder)
    assert policy.generation_config.guidance_scale == 1.0
    assert is_distilled(folder)
    torch.testing.assert_close(stock_logits(policy), logits, atol=2e-5, rtol=0)


def test_adapter_argument(adapter, tiny_folder):
    folder, logits = adapter
    write_provenance(folder, Provenance("student"))
    policy = load_policy(tiny_folder, adapter=folder)
    assert policy.generation_config.guidance_scale == 1.0
    torch.testing.assert_close(stock_logits(policy), logits, atol=2e-5, rtol=0)


def loaded_with(adapter, base):
    """The three ways to name an adapter."""
    yield load_policy(adapter)
    yield load_policy(base, adapter=adapter)
    yield load_policy(load_policy(base), adapter=adapter)


def test_an_adapter_of_somebody_else_is_guided_as_its_base(adapter, tiny_folder, tmp_path):
    """Fault: a plain LoRA passes for a student, and plays without the guidance that it needs."""
    folder, _ = adapter
    assert not is_distilled(folder)
    for policy in loaded_with(folder, tiny_folder):
        assert policy.generation_config.guidance_scale == 3.0 and not hasattr(policy, "is_distilled")
        assert policy.generation_config.max_new_tokens == 20
    (folder / "generation_config.json").write_text('{"guidance_scale": 2.5, "top_k": 7}')
    for policy in loaded_with(folder, tiny_folder):
        settings = policy.generation_config
        assert (settings.guidance_scale, settings.top_k, settings.max_new_tokens) == (2.5, 7, 20)
        assert settings.decoder_start_token_id == 16
    student = shutil.copytree(tiny_folder, tmp_path / "student")
    write_provenance(student, Provenance("student", guidance_scale=3.0))
    edited = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(edited | {"base_model_name_or_path": str(student)})
    )
    assert is_distilled(folder), "its base is a student"
    for policy in loaded_with(folder, student):
        assert policy.generation_config.guidance_scale == 1.0 and policy.is_distilled


def test_live_model_is_prepared_in_place(tiny_model):
    tiny_model.half().train()
    assert load_policy(tiny_model) is tiny_model
    assert tiny_model.dtype == torch.float32
    assert not tiny_model.training
    assert tiny_model.generation_config.guidance_scale == 3.0


def test_live_peft_model_keeps_its_adapter(tiny_model):
    wrapped = lora(load_policy(tiny_model))
    logits = stock_logits(wrapped)
    policy = load_policy(wrapped)
    assert policy is tiny_model
    assert policy.generation_config.guidance_scale == 1.0
    torch.testing.assert_close(stock_logits(policy), logits)


def edited_config(tiny_folder, tmp_path, **changes):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "edited"))
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if isinstance(value, dict):
            config[name].update(value)
        else:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "musicgen_melody"}, "MusicGen-Melody"),
        ({"model_type": "gpt2"}, "'gpt2' model, not a MusicGen"),
        ({"decoder": {"pad_token_id": 0}}, "pad_token_id=0.*16"),
    ],
)
def test_other_models_are_refused_by_name(tiny_folder, tmp_path, changes, message):
    folder = edited_config(tiny_folder, tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_policy(folder)
    assert str(folder) in str(error.value)


def test_what_is_not_there_is_refused(tmp_path):
    for source, message in [
        (tmp_path / "nothing", "no folder.*nothing.*no Hub id"),
        (tmp_path, r"no config\.json"),
        ("nobody/nothing", "no folder nobody/nothing.*Hub failed"),
    ]:
        for load in (load_policy, load_processor):
            if source != tmp_path or load is load_policy:
                with pytest.raises(FileNotFoundError, match=message):
                    load(source)
    with pytest.raises(ValueError, match=r"expected a Musicgen.*Linear"):
        load_policy(nn.Linear(1, 1))


def test_a_training_that_has_not_ended_names_its_last_checkpoint(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "run" / "checkpoint-5")
    with pytest.raises(FileNotFoundError, match=r"training has not ended.*run/checkpoint-5"):
        load_policy(tmp_path / "run")


def test_adapter_without_its_base_is_refused(adapter, tiny_folder):
    folder, _ = adapter
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for base, error, message in [
        ("/nowhere/base", FileNotFoundError, "/nowhere/base.*not here: pass it"),
        (None, ValueError, "does not name its base.*: pass it"),
    ]:
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(error, match=message):
            load_policy(folder)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapter itself"):
        load_policy(folder, adapter=folder)
    for model in (tiny_folder, load_policy(tiny_folder)):
        with pytest.raises(ValueError, match="not a PEFT adapter"):
            load_policy(model, adapter=tiny_folder)


def test_adapter_beside_a_full_checkpoint_is_refused(adapter, tiny_folder):
    """transformers would load the merged weights and adapt them a second time."""
    folder, _ = adapter
    shutil.copy(Path(tiny_folder) / "config.json", folder)
    with pytest.raises(ValueError, match="adapted twice"):
        load_policy(folder)


def test_processor_of_folder_and_of_adapter(adapter, tiny_folder, tmp_path):
    expected = tiny_processor()(text=PROMPTS, padding=True)["input_ids"]
    for source in (tiny_folder, adapter[0]):
        assert load_processor(source)(text=PROMPTS, padding=True)["input_ids"] == expected
    tiny_musicgen().save_pretrained(tmp_path / "bare")
    with pytest.raises(
        ValueError, match=r"has no tokenizer.*copy the tokenizer and processor files of its base"
    ):
        load_processor(tmp_path / "bare")


def test_a_student_is_sampled_as_it_was_trained(adapter, tiny_folder, tmp_path):
    """Fault: an adapter, or a folder that lost its generation settings, is sampled with the base's top-k."""
    full = Path(shutil.copytree(tiny_folder, tmp_path / "full"))
    (full / "generation_config.json").unlink()
    base = load_policy(tiny_folder)
    base.generation_config.top_k = 7
    for folder, wrapped in ((adapter[0], None), (full, None), (base, adapter[0])):
        student = Provenance("student", sampling={"temperature": 0.9, "top_k": 0, "num_frames": 20})
        write_provenance(wrapped or folder, student)
        settings = load_policy(folder, adapter=wrapped).generation_config
        assert (settings.top_k, settings.temperature, settings.max_new_tokens) == (0, 0.9, 23)
        assert settings.guidance_scale == 1.0


def test_nothing_is_said_that_nobody_can_act_on(tmp_path, caplog, monkeypatch):
    """transformers calls the special token of every MusicGen a fault; a user would believe it."""
    log, text = logging.getLogger("transformers.configuration_utils"), tiny_config().to_json_string()
    # where CI is set in the environment, transformers lets its messages reach the root logger too
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    folders = [tmp_path / "17", tmp_path / "18"]  # another size each time: it warns once per message
    for folder in folders:
        folder.mkdir()
        size = re.sub(r'(vocab_size|_token_id)": 16\b', rf'\1": {folder.name}', text)
        (folder / "config.json").write_text(size)
    caplog.clear()
    assert MUSICGEN.load_config(folders[0]).decoder.vocab_size == 17
    log.warning("a real fault")
    assert [record.getMessage() for record in caplog.records] == ["a real fault"]
    MusicgenConfig.from_pretrained(folders[1])  # outside of our own loading it speaks as ever
    assert len(caplog.records) > 1
