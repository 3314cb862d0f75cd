"""Recipes by name, and commands that launch accelerate: what is found, what goes to whom."""

import re

import pytest

from diverse_cfg.assets import accelerate_config, recipe_path, recipes
from diverse_cfg.cli import launch, main
from diverse_cfg.cli import train as command
from diverse_cfg.settings import read_settings


def test_the_list_names_what_train_and_accelerate_take(capsys):
    """Fault: a recipe that is installed and not listed, or a line of the list that no command takes."""
    assert main(["recipes"]) == 0
    names = re.findall(r"^  (\S+)  +\S", capsys.readouterr().out, flags=re.MULTILINE)
    assert {"nano/quality", "musicgen-small/diversity-lora", "musicgen-large/evaluate", "fsdp", "zero1"} <= {
        *names
    }
    for name in names:
        assert read_settings(recipe_path(name) if "/" in name else accelerate_config(name))
    assert len([name for name in names if "/" not in name]) == 7


def test_one_is_shown_and_copied_to_be_changed(tmp_path, capsys):
    path = recipes()["musicgen-small/quality"]
    assert main(["recipes", "show", "musicgen-small/quality"]) == 0
    assert capsys.readouterr().out == path.read_text(encoding="utf-8")
    assert main(["recipes", "copy", "musicgen-small", str(tmp_path / "mine")]) == 0
    copied = {target.name: target.read_bytes() for target in (tmp_path / "mine").iterdir()}
    assert copied == {other.name: other.read_bytes() for other in path.parent.glob("*.yaml")}
    assert (
        main(["recipes", "copy", "musicgen-small/quality", str(tmp_path / "mine")]) == 2
    )  # changed since, perhaps
    assert "quality.yaml: exists already; choose another folder" in capsys.readouterr().err
    assert main(["recipes", "copy", "accelerate", str(tmp_path / "launch")]) == 0
    assert (tmp_path / "launch" / "fsdp.yaml").read_text() == recipes("accelerate")["fsdp"].read_text()


@pytest.mark.parametrize("spelling", ["--recipe nano/quality", "--recipe=nano/quality"])
def test_a_recipe_by_name_sets_and_a_flag_overrides(monkeypatch, tmp_path, spelling):
    """Fault: a name that only works in a clone, and a recipe that beats what was typed."""
    calls = []
    monkeypatch.setattr(command, "train", lambda *args: calls.append(args))
    monkeypatch.chdir(tmp_path)  # no clone
    assert main(["train", *spelling.split(), "--max_steps", "7", "--use_cpu", "true"]) == 0
    assert (calls[0][0].dataset_name, calls[0][1].max_steps) == ("nano", 7)
    assert calls[0][1].learning_rate == 7e-4
    # What the pages say works without a clone too, and a file of one's own comes first.
    assert recipe_path("recipes/nano/quality.yaml") == str(recipes()["nano/quality"])
    (tmp_path / "recipes" / "nano").mkdir(parents=True)
    (tmp_path / "recipes" / "nano" / "quality.yaml").write_text("max_steps: 3\n")
    assert recipe_path("recipes/nano/quality.yaml") == "recipes/nano/quality.yaml"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "train --recipe nano/qualty",
            "neither a file nor an installed one; did you mean nano/quality?",
        ),
        ("train --recipe", "--recipe its name"),
        ("train --recipe nano/quality --config a.yaml", "--config is given twice"),
        ("merge --recipe nano/qualty", "did you mean nano/quality?"),
        ("train --recipe nano/quality --accelerate_config fsd", "did you mean fsdp?"),
        (
            "train --recipe nano/quality --accelerate_config cpu --num_processes 2",
            "choose --accelerate_config ddp",
        ),
        ("recipes show qqq", "installed are musicgen-large/diversity, "),
    ],
)
def test_a_wrong_name_is_told_what_is_right(line, message, capsys):
    assert main(line.split()) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert message in error


def test_a_launched_process_launches_no_others(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--recipe", "nano/quality", "--num_processes", "2"]) == 2
    assert "a launcher has started this process already" in capsys.readouterr().err


def test_each_option_goes_to_whom_it_belongs(monkeypatch):
    """Fault: accelerate eats a setting of the trainer, or the trainer is told of accelerate's ports."""
    import accelerate.commands.launch

    launched = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launched.append)
    line = (
        "--recipe nano/quality --accelerate_config fsdp2 --num_processes 4 --max_steps 3 --main_process_port=0 "
        "--gradient_accumulation_steps 2 --fsdp_offload_params true --lora_target_modules q_proj v_proj --use_peft"
    )
    assert main(["train", *line.split()]) == 0
    [args] = launched
    assert (args.num_processes, args.main_process_port, args.fsdp_offload_params) == (4, 0, "true")
    assert args.config_file == str(recipes("accelerate")["fsdp"])
    assert (args.module, args.training_script) == (True, "diverse_cfg")
    assert args.training_script_args == [
        *("train", "--config", str(recipes()["nano/quality"]), "--max_steps", "3"),
        *("--gradient_accumulation_steps", "2", "--lora_target_modules", "q_proj", "v_proj", "--use_peft"),
    ]


def test_what_accelerate_and_the_trainer_share_is_known():
    """Fault: a new version of either shares a name, which would silently go to accelerate."""
    from accelerate.commands.launch import launch_command_parser
    from trl import TrlParser

    from diverse_cfg.config import CFGDiversityConfig

    trainers = TrlParser((command.TrainArguments, CFGDiversityConfig))._option_string_actions
    assert {*trainers} & {*launch_command_parser()._option_string_actions} <= launch.SHARED
