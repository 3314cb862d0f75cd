"""`push_to_hub` of the trainer: private, the right weights, and nothing of this machine in what is sent."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from peft import LoraConfig
from safetensors.torch import load_file

from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.provenance import read_provenance
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer
from tests.tiny import PROMPTS
from tests.training import CodeEmbedder, tiny_args, tiny_trainer

FC1 = "decoder.model.decoder.layers.0.fc1.weight"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What transformers asks of the Hub: the repositories that were made, and copies of what was sent."""
    calls = SimpleNamespace(created=[], folders=[])

    def create_repo(repo_id, private=None, **_):
        calls.created.append((repo_id, private))
        return SimpleNamespace(repo_id=f"user/{repo_id}")

    def upload_folder(folder_path, **_):
        calls.folders.append(tmp_path / f"sent-{len(calls.folders)}")
        shutil.copytree(folder_path, calls.folders[-1])
        return SimpleNamespace(done=lambda: True)

    api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api, raising=False)
    monkeypatch.setattr(transformers.trainer, "create_repo", create_repo, raising=False)
    monkeypatch.setattr(transformers.trainer, "upload_folder", upload_folder, raising=False)
    return calls


def test_a_repository_is_private_unless_asked_otherwise(tmp_path):
    """Fault: transformers' default, by which an account's new repositories are public."""
    assert CFGDiversityConfig(output_dir=str(tmp_path)).hub_private_repo is True
    assert CFGDiversityConfig(output_dir=str(tmp_path), hub_private_repo=False).hub_private_repo is False
    assert CFGDiversityConfig(output_dir=str(tmp_path)).hub_strategy == "end"


def test_what_is_pushed(hub, tmp_path, tiny_folder):
    """Faults: a public repository, raw weights instead of the averaged, folders of this machine."""
    trainer = CFGDiversityTrainer(
        tiny_folder,
        DiversityReward(CodeEmbedder()),
        tiny_args(tmp_path / "run", ema_decay=0.9, push_to_hub=True, save_strategy="steps", save_steps=3),
        train_dataset=PROMPTS,
    )
    trainer.train()
    averaged = trainer.model.decoder.model.decoder.layers[0].fc1.weight
    raw = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")[FC1]
    assert (raw - averaged).abs().max() > 1e-3
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    trainer.save_model()  # pushes, for so it was asked
    trainer.push_to_hub()
    assert hub.created == [("run", True)]
    assert len(hub.folders) == 2
    for folder in hub.folders:
        sent = load_file(folder / "model.safetensors")[FC1]
        assert torch.equal(sent, averaged)
        provenance = read_provenance(folder)
        assert provenance.base_model == provenance.training["initial_model"] == tiny_folder.split("/")[-1]
        for path in folder.rglob("*"):
            if path.suffix in (".json", ".md"):
                assert str(tmp_path.parent) not in path.read_text(), path.name
        assert not list(folder.rglob("*.bin"))
        assert json.loads((folder / "generation_config.json").read_text())["guidance_scale"] == 1.0
    # Here the base can still be found.
    assert read_provenance(tmp_path / "run").base_model == tiny_folder


def test_weights_of_checkpoints_are_not_pushed_for_the_average(hub, tmp_path):
    """Fault: with every_save the repository has the raw weights, which nobody evaluated."""
    with pytest.raises(ValueError, match=r"hub_strategy='every_save' pushes the raw weights.*ema_decay=0.9"):
        tiny_trainer(tmp_path, ema_decay=0.9, push_to_hub=True, hub_strategy="every_save")
    trainer = tiny_trainer(
        tmp_path,
        push_to_hub=True,
        hub_strategy="checkpoint",
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
    )
    trainer.train()
    root, checkpoint = hub.folders  # sent when it has taken its place
    assert (root / "model.safetensors").is_file() and (checkpoint / "trainer_state.json").is_file()


def test_an_adapter_of_a_folder_is_not_pushed(hub, tmp_path):
    with pytest.raises(ValueError, match=r"push_to_hub=True with a LoRA adapter of None.*publish --merged"):
        tiny_trainer(tmp_path, peft_config=LoraConfig(r=2), push_to_hub=True)
    assert not hub.created
