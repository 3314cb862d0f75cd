"""`diverse-cfg train`: recipe and flags become settings, nothing is written over, a tiny student trains."""

import json
import warnings
from types import SimpleNamespace

import pytest

from diverse_cfg.cli import main
from diverse_cfg.cli import train as command
from diverse_cfg.config import GuardConfig
from diverse_cfg.facets import REWARDED_FACETS
from tests.tiny import PROMPTS

RECIPE = """\
model_name_or_path: some/model
dataset_name: prompts.txt
learning_rate: 1e-4
diversity_coef: 0
per_device_train_batch_size: 4
guards: {silence_dbfs: -50}
"""


@pytest.fixture
def parsed(monkeypatch):
    """What `train` would be called with."""
    calls = []
    monkeypatch.setattr(command, "train", lambda *args: calls.append(args))
    return calls


def test_a_recipe_sets_and_a_flag_overrides(parsed, tmp_path):
    """Catches YAML numbers that stay strings (1e-4), lost nested groups, and a recipe that beats the flag."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), "--use_peft"]
    assert main(["train", *flags, "--diversity_coef", "7", "--lora_target_modules", "q_proj", "v_proj"]) == 0
    args, config = parsed[0]
    assert args.model_name_or_path == "some/model"
    assert (args.use_peft, args.lora_target_modules) == (True, ["q_proj", "v_proj"])
    assert (config.learning_rate, config.diversity_coef, config.guidance_scale) == (1e-4, 7.0, 3.0)
    assert config.guards.silence_dbfs == -50


def test_a_range_of_guidance(parsed, tmp_path):
    """As settings of a recipe, or as text on the command line."""
    (tmp_path / "recipe.yaml").write_text(RECIPE + "guidance_scale: {low: 1, high: 5}\n")
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    for more, wanted in (
        ([], {"low": 1, "high": 5}),
        (["--guidance_scale", "[1, 2.5, 4]"], [1, 2.5, 4]),
        (["--guidance_scale", "{low: 1, high: 2}"], {"low": 1, "high": 2}),
        (["--guidance_scale", "2"], 2),
    ):
        assert main(["train", *flags, *more]) == 0
        assert parsed[-1][1].guidance_scale == wanted


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RECIPE + "diversty_coef: 5\n", "no setting --diversty_coef; did you mean --diversity_coef?"),
        (RECIPE + "diversity-coef: 9\n", "no setting diversity-coef; did you mean diversity_coef?"),
        (RECIPE + "no_alarms: true\n", "no setting no_alarms; did you mean alarms?"),
        (RECIPE + "qqq: 5\n", "no setting --qqq; see diverse-cfg train --help"),
        (RECIPE + "guidance_scale: 0.5\n", "guidance_scale=0.5 must be"),
        (RECIPE.replace("-50}", "-50, cap: 1}"), "guards has no field cap"),
        (RECIPE + "num_generations: 2.7\n", "num_generations=2.7 must be an integer"),
        (RECIPE + "max_steps: null\n", "max_steps=None must be an integer"),
        (RECIPE + "warmup_steps: [1]\n", "warmup_steps=[1] must be a finite number"),
        (RECIPE + "weight_decay: true\n", "weight_decay=True must be a finite number"),
        (RECIPE + 'max_steps: "8"\n', "max_steps='8' must be an integer"),
        (RECIPE + "weight_decay: .nan\n", "weight_decay=nan must be a finite number"),
        (
            RECIPE + "eval_strategy: no\n",
            "must be 'no' or 'steps' or 'epoch' or text (YAML reads no, off, yes",
        ),
        (RECIPE + "lora_target_modules: q_proj\n", "lora_target_modules='q_proj' must be a list"),
        (RECIPE + "lora_r: 1.5\n", "lora_r=1.5 must be an integer"),
        (RECIPE.replace("-50}", "loud}"), "guards.silence_dbfs='loud' must be a finite number"),
        (RECIPE + "max-steps: 5\n", "no setting max-steps; did you mean max_steps?"),
        (RECIPE + "diversity_coef: 5\n", "diversity_coef is set twice: keep one"),
        (RECIPE.replace("-50}", "-50, silence_dbfs: -40}"), "silence_dbfs is set twice"),
        (RECIPE + "~: 5\n", "the name '~' is not text"),
        (RECIPE + "on: 5\n", "the name 'on' is not text: name a setting, in quotes if need be"),
        (RECIPE + "2: 5\n", "the name '2' is not text"),
        ("[" * 5000, "is not valid YAML"),
        ("- a\n- b\n", "must hold settings by name (name: value), not a list"),
        ("guards: {silence_dbfs: -50\n", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line(parsed, tmp_path, refused, recipe, message):
    (tmp_path / "recipe.yaml").write_text(recipe)
    flags = ("--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "run")
    assert message in refused("train", *flags) and parsed == []


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--learning_rate", "inf", "learning_rate=inf must be a finite number"),
        ("--weight_decay", "nan", "weight_decay=nan must be a finite number"),
        ("--num_generations", "0", "num_generations=0 must be at least 2"),
        ("--num_iterations", "0", "num_iterations=0 must be at least 1"),
        ("--gradient_accumulation_steps", "-1", "gradient_accumulation_steps=-1 must be at least 1"),
        ("--max_steps", "0", "max_steps=0 must be at least 1, or -1"),
        ("--torch_compile_backend", "inductor", "torch_compile_backend='inductor' is not supported"),
        ("--label_smoothing_factor", "0.1", "label_smoothing_factor=0.1 is not supported"),
        ("--lr_scheduler_kwargs", "{x: 1}", "lr_scheduler_kwargs='{x: 1}' is not JSON: Expecting"),
        ("--lora_r", "99", "lora_r=99 has no effect: set use_peft"),
        ("--optim_args", "banana=3", "optim_args='banana=3': optim=adamw_torch"),
        ("--optim_args", "banana", "optim_args='banana': 'banana' must be name=value"),
        ("--lr_scheduler_type", "warmup_stable_decay", "lr_scheduler_type=warmup_stable_decay with"),
    ],
)
def test_a_wrong_number_or_idle_flag_is_one_line(parsed, tmp_path, refused, flag, value, said):
    flags = ("--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", tmp_path / "run")
    assert refused("train", *flags, flag, value).startswith(said) and parsed == []


def test_what_has_no_effect_is_said_again_and_in_spite_of_a_filter(parsed, tmp_path, capsys):
    """Fault: with PYTHONWARNINGS=ignore, or in a second call, a setting is taken without a word."""
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path / "run")]
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main(["train", *flags, "--teacher_fraction", "0.2"]) == 0
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "teacher_fraction=0.2 has no effect: it needs" in line], said


def test_config_may_be_joined_by_an_equals_sign(parsed, tmp_path, refused):
    """Fault: `--config=FILE` is read by nobody."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    flags = [f"--config={tmp_path}/recipe.yaml", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags]) == 0 and parsed[0][0].dataset_name == "prompts.txt"
    assert "--config is given twice" in refused("train", *flags, "--config", "other.yaml")
    assert "needs the path of a YAML file" in refused("train", "--config")
    assert "/no/such/recipe.yaml" in refused("train", "--config", "/no/such/recipe.yaml")


def test_a_missing_setting_shows_a_short_usage(parsed, capsys):
    """Not the two hundred options of a trainer."""
    with pytest.raises(SystemExit) as stop:
        main(["train", "--output_dir", "run"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--model_name_or_path" in error and "required" in error
    assert len(error.splitlines()) < 10


def test_a_mistyped_flag_names_the_nearest(parsed, refused):
    said = refused("train", "--learnin_rate=1e-4", "--output_dir", "run")
    assert "no setting --learnin_rate; did you mean --learning_rate?" in said


def test_the_output_folder_is_asked_for(parsed, tmp_path, capsys):
    """Fault: a student in `trainer_output`, which nobody named."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "recipe.yaml")])
    assert stop.value.code == 2 and "--output_dir" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(RECIPE + "output_dir: run\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0


def test_a_tracker_that_is_not_installed_is_one_line(parsed, tmp_path, monkeypatch, refused):
    """Fault: a traceback of transformers after the model was loaded."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    flags = ("--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "run", "--report_to", "wandb")
    assert "report_to=wandb needs the package wandb: pip install wandb" in refused("train", *flags)
    assert parsed == []


def test_help_comes_from_the_real_parser(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    own, others = text.split("TRL's and transformers'")
    assert "--diversity_coef" in own and "--dataset_name" in own and "--output_dir" in own
    assert "--adam_epsilon" in others and "(default: 5.0)" in own and "(default: None)" not in text


def config_for(output, resume=None, process_index=0):
    return SimpleNamespace(output_dir=str(output), resume_from_checkpoint=resume, process_index=process_index)


def test_where_training_continues(tmp_path, caplog):
    run = tmp_path / "run"
    caplog.set_level("INFO", "diverse_cfg")
    assert command.checkpoint_of(config_for(run)) is None and not caplog.messages
    assert command.checkpoint_of(config_for(run, "true")) is None  # nothing there yet: begin, and say so
    assert "run holds no complete checkpoint, so the run begins anew" in caplog.messages[0]
    run.mkdir()
    assert command.checkpoint_of(config_for(run)) is None
    for step in (5, 10, 15):
        (run / f"checkpoint-{step}").mkdir()
        if step < 15:  # the last one was cut off while it was written
            (run / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with pytest.raises(
        FileExistsError, match="not empty; add --resume_from_checkpoint true, or choose another"
    ):
        command.checkpoint_of(config_for(run))
    assert command.checkpoint_of(config_for(run, "False", process_index=1)) is None
    assert command.checkpoint_of(config_for(run, "true")) == str(run / "checkpoint-10")
    assert command.checkpoint_of(config_for(run, str(run / "checkpoint-5"))) == str(run / "checkpoint-5")
    with pytest.raises(ValueError, match="is not a folder; pass true"):
        command.checkpoint_of(config_for(run, "checkpoint-7"))


def test_reward_functions_by_name(monkeypatch):
    """Catches an axis that is lost, a forgotten diversity reward, and one that nobody asked for."""
    import diverse_cfg.rewards as rewards
    import diverse_cfg.trainer.setup as setup

    monkeypatch.setattr(rewards, "TextAdherenceReward", lambda: "adherence")
    monkeypatch.setattr(rewards, "AestheticsReward", lambda axis: f"aesthetics {axis}")
    monkeypatch.setattr(setup, "default_reward", lambda config, model: f"diversity for {model}")
    args = SimpleNamespace(reward_funcs=["text_adherence", "aesthetics_pq"])
    with_diversity = command._rewards(args, SimpleNamespace(diversity_coef=5), "m")
    assert with_diversity == ["diversity for m", "adherence", "aesthetics PQ"]
    assert command._rewards(args, SimpleNamespace(diversity_coef=0), "m") == ["adherence", "aesthetics PQ"]
    args.reward_funcs = ["diversity_rhythm", "text_adherence"]
    guards = GuardConfig(max_silence=0.2)
    _, rhythm, other = command._rewards(args, SimpleNamespace(diversity_coef=5, guards=guards), "m")
    assert (rhythm.__name__, rhythm.guards, other) == ("diversity_rhythm", guards, "adherence")
    assert command.FACETS == REWARDED_FACETS
    args.reward_funcs = None
    assert command._rewards(args, SimpleNamespace(diversity_coef=5), "m") is None
    named = SimpleNamespace(diversity_coef=0, diversity_embedder="e")  # only logged
    assert command._rewards(args, named, "m") == ["diversity for m"]


def test_a_split_of_a_file_is_refused(tmp_path, tiny_folder, capsys):
    """Fault: all of the file was trained on, whatever split was asked for."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a slow piano\n")
    arguments = ["--model_name_or_path", str(tiny_folder), "--output_dir", str(tmp_path / "run")]
    arguments += ["--dataset_name", str(prompts), "--dataset_train_split", "small", "--report_to", "none"]
    assert main(["train", *arguments]) == 2
    assert f"dataset_train_split=small: the file {prompts} has no splits" in capsys.readouterr().err


def test_an_unknown_reward_is_refused_before_anything_is_loaded(tmp_path):
    args = command.TrainArguments("no/model", "no.txt", reward_funcs=["text_adherence", "louder"])
    with pytest.raises(ValueError, match="has no louder; known: text_adherence, aesthetics_ce"):
        command.train(args, config_for(tmp_path / "run"))


def test_a_tiny_student_trains_is_saved_and_continues(tiny_folder, tmp_path, capsys, refused):
    """The whole command once, without diversity (which would need an encoder)."""
    (tmp_path / "train.txt").write_text("\n".join(PROMPTS))
    run = tmp_path / "run"
    flags = [
        *("--model_name_or_path", tiny_folder, "--dataset_name", str(tmp_path), "--output_dir", str(run)),
        *("--diversity_coef", "0", "--clip_seconds", "0.2", "--per_device_train_batch_size", "4"),
        *("--num_generations", "2", "--save_steps", "1", "--logging_steps", "1", "--audio_samples", "0"),
    ]
    assert main(["train", *flags, "--max_steps", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run)
    provenance = json.loads((run / "diverse_cfg.json").read_text())
    assert (provenance["kind"], provenance["guidance_scale"]) == ("student", 3.0)
    assert json.loads((run / "generation_config.json").read_text())["guidance_scale"] == 1.0

    assert "not empty" in refused("train", *flags, "--max_steps", "2")
    assert main(["train", *flags, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert [entry["step"] for entry in state["log_history"]][:2] == [1, 2]


def test_a_split_of_held_out_prompts_in_a_file_is_refused(tmp_path):
    """Fault: all of the file is evaluated on, where a part of it was asked for."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    args = command.TrainArguments(
        "m", "d", eval_dataset_name=str(tmp_path / "p.txt"), dataset_test_split="dev"
    )
    with pytest.raises(
        ValueError, match=r"dataset_test_split=dev: the file .*p\.txt has no splits; leave it out"
    ):
        command._held_out(args)
    args.dataset_test_split = None
    assert command._held_out(args)["prompt"] == ["a", "b"]


@pytest.mark.parametrize("split", ["train", "test", None])
def test_what_it_trains_on_is_not_held_out(tmp_path, split):
    """Fault: the training prompts are evaluated on, by a split's name that says or means nothing."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    again = None if split else str(tmp_path)
    args = command.TrainArguments("m", str(tmp_path), eval_dataset_name=again, dataset_test_split=split)
    message = "evaluated on what it trains on" if split == "train" else "split='test': .* has no splits"
    with pytest.raises(ValueError, match=message):
        command._held_out(args)
    args.eval_dataset_name = str(tmp_path / "prompts.txt")
    args.dataset_test_split = None
    assert command._held_out(args)["prompt"] == ["a", "b"], "asked for by another name"
