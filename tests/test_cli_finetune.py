"""`diverse-cfg finetune`: from a folder of recordings to a base that every other command takes."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile

from diverse_cfg.cli import main
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.settings import read_settings
from tests.standins import save_standin
from tests.test_recordings import RATE, music, write
from tests.tiny import PROMPTS

RECIPES = Path(__file__).parent.parent / "recipes"
QUICK = ["--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true", "--audio_samples", "1"]


def folder_of(folder, rate=RATE):
    for index, caption in enumerate(PROMPTS):
        write(folder / f"{index}.flac", music(1.0 + index / 8, rate, seed=index), rate, caption)
    return str(folder)


def finetune(tmp_path, model, *flags):
    arguments = ["--model_name_or_path", model, "--dataset_name", folder_of(tmp_path / "music")]
    arguments += ["--output_dir", str(tmp_path / "run"), "--clip_seconds", "0.4", *QUICK, *flags]
    return main(["finetune", *arguments])


@pytest.mark.parametrize("lora", [False, True])
def test_a_folder_becomes_a_base(tmp_path, tiny_folder, capsys, lora):
    flags = ["--max_steps", "3", "--learning_rate", "1e-2", *(["--use_peft", "true"] if lora else [])]
    assert finetune(tmp_path, tiny_folder, *flags) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(tmp_path / "run")
    assert "recordings: 4, 0.1 min" in err and "estimate: " in err and "held-out recordings: loss" in err
    facts = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert facts["recordings"] == {"train": 3, "validation": 1} and facts["steps"] == 3
    first, last = facts["evaluations"]
    assert last["eval_loss"] < first["eval_loss"] and (first["step"], last["step"]) == (0, 3)
    assert str(tmp_path) not in json.dumps(facts)  # it may be published
    prompts = [(tmp_path / "run" / "prompts" / f"{split}.txt").read_text() for split in facts["recordings"]]
    assert sorted("".join(prompts).splitlines()) == sorted(PROMPTS)
    assert len(list((tmp_path / "run" / "audio").glob("step-00000[03]/*.wav"))) == 2
    assert load_policy(tmp_path / "run").generation_config.guidance_scale == 3.0
    assert (tmp_path / "run" / "checkpoint-3" / "adapter_config.json").is_file() == lora
    # Nothing is written over by accident, and a finished run is not trained on.
    assert finetune(tmp_path, tiny_folder, *flags) == 2
    assert "is not empty; add --resume_from_checkpoint true" in capsys.readouterr().err
    assert finetune(tmp_path, tiny_folder, *flags, "--resume_from_checkpoint", "true") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clip_secnds", "3"], "finetune has no setting --clip_secnds; did you mean --clip_seconds?"),
        (["--text_dropout", "1"], "text_dropout=1.0 must be at least 0 (off) and below 1"),
        (["--dataset_name", "/no/such/folder"], "no prompt file or folder '/no/such/folder'"),
        (
            ["--dataset_name", "x", "--eval_dataset_name", "x"],
            "=x: it would be evaluated on what it trains on",
        ),
        (["--lora_r", "4"], "lora_r=4 has no effect: set use_peft"),
        (["--held_out", "0", "--load_best_model_at_end", "true"], "set held_out above 0"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, tiny_folder, capsys, flags, message):
    assert finetune(tmp_path, tiny_folder, *flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_caption_that_is_missing_names_the_file(tmp_path, tiny_folder, capsys):
    folder_of(tmp_path / "music")
    write(tmp_path / "music" / "9.wav", music())
    assert finetune(tmp_path, tiny_folder) == 2
    assert "9.wav has no caption: write it into 9.txt beside it" in capsys.readouterr().err
    assert finetune(tmp_path, tiny_folder, "--dataset_caption", "a song", "--max_steps", "1") == 0


def documented():
    """The five commands of the page, as words."""
    section = (RECIPES / "README.md").read_text(encoding="utf-8").partition("## Your own recordings")[2]
    return [
        shlex.split(line)[1:]
        for line in re.findall(r"^    (diverse-cfg .*)$", section.partition("\n## ")[0], re.M)
    ]


@pytest.mark.slow
def test_the_five_commands_of_the_page_run_on_nano(tmp_path, monkeypatch):
    """Faults: a base that `train` does not take as a teacher, prompts that it cannot read, another codec."""
    monkeypatch.chdir(tmp_path)
    for index in range(12):
        path = tmp_path / "music" / f"{index}.wav"
        write(path, music(3.5, rate=22050, channels=1 + index % 2, seed=index), 22050, PROMPTS[index % 4])
    commands = documented()
    assert [words[0] for words in commands] == ["finetune", "train", "train", "merge", "generate"]
    for words in commands:
        if words[0] in ("finetune", "train"):
            words[words.index("--max_steps") + 1] = "2"
            words += ["--disable_tqdm", "true"]
        words += ["--per_device_train_batch_size", "4"] if words[0] == "train" else []
        assert main(words) == 0, words
    [clip] = (tmp_path / "runs" / "mine" / "clips").glob("*.wav")
    audio, rate = soundfile.read(clip)
    assert rate == 16_000 and audio.shape[-1] == 48_000 and np.abs(audio).max() > 1e-4
    provenance = json.loads((tmp_path / "runs" / "mine" / "student" / "diverse_cfg.json").read_text())
    assert provenance["base_model"] == "runs/mine/base" and provenance["guidance_scale"] == 3.0


@pytest.mark.slow
def test_the_recipe_runs_on_a_stand_in(tmp_path, monkeypatch):
    """Fault: a setting that does not exist, or a header that names another file or leaves the memory out."""
    path = RECIPES / "musicgen-small" / "finetune.yaml"
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert "--config recipes/musicgen-small/finetune.yaml" in header and "ESTIMATED" in header
    assert read_settings(path)["clip_seconds"] == 30.0
    flags = {
        "model_name_or_path": save_standin(tmp_path / "small", "small"),
        "dataset_name": folder_of(tmp_path / "music", rate=32_000),
        "output_dir": str(tmp_path / "run"),
        "clip_seconds": "0.4",
        "max_steps": "2",
        "eval_steps": "1",
        "save_steps": "1",
    }
    words = [part for name, value in flags.items() for part in (f"--{name}", value)]
    assert main(["finetune", "--config", str(path), *words, *QUICK, "--warmup_steps", "1"]) == 0
    assert load_policy(tmp_path / "run").generation_config.guidance_scale == 3.0
