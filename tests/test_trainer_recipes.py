"""Every recipe, found by glob: it parses, names what exists, and runs on a stand-in of its model."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

from diverse_cfg.assets import nano_path
from diverse_cfg.cli import main
from diverse_cfg.embeddings.contrastive import ContrastiveConfig, ContrastiveEmbedder, ContrastiveEncoder
from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep
from diverse_cfg.merging import parse_sweep
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.prompts import load_prompts
from diverse_cfg.settings import read_settings
from tests.standins import SIZES, save_standin
from tests.tiny import PROMPTS
from tests.training import tiny_trainer

RECIPES = Path(__file__).parent.parent / "recipes"
TRAIN = sorted(
    path for path in RECIPES.glob("*/*.yaml") if path.stem.split("-")[0] in ("quality", "diversity")
)
MERGE = sorted(RECIPES.glob("*/merge.yaml"))
EVALUATE = sorted(RECIPES.glob("*/evaluate.yaml"))
LAUNCH = sorted((RECIPES / "accelerate").glob("*.yaml"))


def identity(path):
    return f"{path.parent.name}/{path.stem}"


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def standins(tmp_path_factory):
    """Folders by size; nano's stands for its own kind of base."""
    root = tmp_path_factory.mktemp("released")
    return {size: save_standin(root / size, size) for size in SIZES}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A small encoder of audio instead of CLAP."""
    torch.manual_seed(0)
    config = ContrastiveConfig(hidden_size=16, num_layers=1, num_heads=2, dim=8)
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    ContrastiveEmbedder(ContrastiveEncoder(config)).save_pretrained(folder)
    return str(folder)


def test_there_are_recipes():
    """Fault: the glob finds nothing, and every test below passes."""
    assert len(TRAIN) >= 11 and len(MERGE) == len(EVALUATE) == 5 and len(LAUNCH) == 7


@pytest.mark.parametrize("path", TRAIN + MERGE + EVALUATE, ids=identity)
def test_header_tells_hardware_and_command(path):
    """Fault: a recipe that nobody knows how, or on what, to run; or whose command names another file."""
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"--config recipes/{path.parent.name}/{path.name}" in header
    if path in TRAIN:
        assert "Hardware:" in header and re.search(r"\d+ s\b", header)
        assert path.parent.name == "nano" or "ESTIMATED" in header or "measured on" in header


@pytest.mark.parametrize("path", TRAIN, ids=identity)
@pytest.mark.slow
def test_training_recipe_runs_on_a_stand_in(tmp_path, monkeypatch, path, standins, encoder):
    """Fault: a field that does not exist, or a released repository's layout that we cannot read or write."""
    monkeypatch.chdir(RECIPES.parent)
    recipe = read(path)
    size = path.parent.name.removeprefix("musicgen-")
    base = standins.get(size, standins["small"])
    # An encoder of audio wants more than a few frames of a beginning.
    seconds = 1.0 if recipe.get("prefix_baseline") else 0.2
    arguments = {
        "model_name_or_path": base,
        "output_dir": str(tmp_path / "run"),
        "clip_seconds": str(seconds),
        "num_generations": "3",
        "num_generations_eval": "2",
        "per_device_train_batch_size": "3",
        "per_device_eval_batch_size": "2",
        "gradient_accumulation_steps": "1",
        "max_steps": "1",
        "eval_on_start": "false",
        "eval_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "bf16": "false",
        "diversity_embedder": encoder,
    }
    if "teacher_model" in recipe:
        arguments["teacher_model"] = base
    if recipe["dataset_name"] == "nano":
        prompts = tmp_path / "prompts"
        prompts.mkdir()
        for split in ("train", "validation"):
            (prompts / f"{split}.txt").write_text("\n".join(PROMPTS))
        arguments["dataset_name"] = str(prompts)
    flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    assert main(["train", "--config", str(path), *flags]) == 0
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert saved["guidance_scale"] == 1.0 and saved["pad_token_id"] == 2048
    assert saved["max_new_tokens"] == 50 * seconds + 3  # K − 1, or K/2 − 1 in stereo
    assert load_policy(tmp_path / "run").generation_config.guidance_scale == 1.0
    assert load_processor(tmp_path / "run").feature_extractor.sampling_rate == 32_000
    assert (tmp_path / "run" / "adapter_config.json").is_file() == bool(recipe.get("use_peft"))


@pytest.mark.slow
def test_a_diversity_reward_does_not_pay_for_silence():
    """Catches a recipe, or a command of the README, whose student is paid for clips that die early."""
    demo = RECIPES.parent / "diverse_cfg" / "assets" / "demo"
    recipes = [*TRAIN, demo / "quality.yaml", demo / "diversity.yaml"]
    rewarded = {path: settings for path in recipes if (settings := read(path))["diversity_coef"] > 0}
    assert len(rewarded) >= 7
    for path, settings in rewarded.items():
        assert settings["guards"] == {"max_silence": 0.1}, path
        assert "the paper has no guard" in path.read_text(encoding="utf-8")
    readme = (RECIPES.parent / "README.md").read_text(encoding="utf-8")
    for rewarding in re.findall(r"--diversity_coef [1-9](?:.|\\\n)*", readme):
        assert "--guards '{max_silence: 0.1}'" in rewarding


def test_nano_recipe_runs_with_its_own_names(tmp_path, monkeypatch):
    """Fault: `teacher_model: nano` or an encoder's short name reaches the loaders as if it were a folder."""
    monkeypatch.chdir(RECIPES.parent)
    path = RECIPES / "nano" / "diversity.yaml"
    assert (read(path)["teacher_model"], read(path)["dataset_name"]) == ("nano", "nano")
    arguments = {
        "model_name_or_path": "nano",  # instead of the quality student, which another recipe writes
        "output_dir": str(tmp_path / "run"),
        "diversity_embedder": "within-encoder",
        "monitor_embedder": "eval-encoder",
        "num_generations": "3",
        "per_device_train_batch_size": "3",
        "per_device_eval_batch_size": "6",
        "max_steps": "1",
        "eval_on_start": "false",
        "eval_strategy": "no",
        "report_to": "none",
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    assert main(["train", "--config", str(path), *flags]) == 0
    provenance = json.loads((tmp_path / "run" / "diverse_cfg.json").read_text())
    assert Path(provenance["base_model"]) == nano_path()


@pytest.mark.parametrize("path", MERGE, ids=identity)
def test_merge_recipe_runs(tmp_path, monkeypatch, path, tiny_folder):
    """Fault: a name that the command does not know, or checkpoints that the training recipes do not write."""
    written = {read(other)["output_dir"] for other in TRAIN if other.parent == path.parent}
    recipe = read(path)
    assert set(recipe["checkpoints"]) <= written
    arguments = ["merge", tiny_folder, tiny_folder, "--config", str(path), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--sweep", "0:1:0.5"]) == 0
    assert len(list((tmp_path / "out").glob("*/model.safetensors"))) == 3


def test_merge_recipe_with_a_wrong_name_is_refused(tmp_path, tiny_folder, capsys):
    (tmp_path / "merge.yaml").write_text("wieght: 0.5\n")
    arguments = ["merge", tiny_folder, "--config", str(tmp_path / "merge.yaml"), "-o", str(tmp_path / "out")]
    assert main(arguments) == 2 and "no setting wieght" in capsys.readouterr().err


def number_of_systems(entry):
    """Guidance scales times merge weights of one entry of a protocol."""
    scales, weights = entry.get("guidance_scale", 1), entry.get("merge_weight", "1:1:1")
    return (len(scales) if isinstance(scales, list) else 1) * len(parse_sweep(weights))


@pytest.mark.parametrize("path", EVALUATE, ids=identity)
def test_evaluation_recipe_is_a_protocol(path):
    """Fault: a name that the protocol does not know, or systems that the other recipes do not write."""
    config = SweepConfig.from_dict(read(path))
    if said := re.search(r"(\d+) systems", path.read_text(encoding="utf-8")):
        assert int(said[1]) == sum(map(number_of_systems, config.systems))
    written = {read(other)["output_dir"] for other in TRAIN if other.parent == path.parent}
    bases = {read(other)["model_name_or_path"] for other in TRAIN if other.parent == path.parent}
    for system in config.systems:
        models = system.get("checkpoints", [system.get("model")])
        assert set(models) <= written | bases, system["name"]


@pytest.mark.parametrize("path", EVALUATE, ids=identity)
def test_evaluation_recipe_is_built(path, standins, encoder, tmp_path):
    """Fault: a sweep that is refused once its students are there, after days of training."""
    text = path.read_text(encoding="utf-8").replace("runs/", f"{tmp_path}/runs/")
    size = path.parent.name.removeprefix("musicgen-")
    text = re.sub(r"facebook/musicgen-[\w-]+", standins.get(size, ""), text)
    text = re.sub(r"laion/\w+", encoder, text).replace("prompts: recipes/", f"prompts: {RECIPES}/")
    (tmp_path / "evaluate.yaml").write_text(text, encoding="utf-8")
    for folder in re.findall(rf"{tmp_path}/runs/[\w/-]+", text):
        Path(folder).mkdir(parents=True, exist_ok=True)
    sweep, systems = build_sweep(SweepConfig.from_dict(read_settings(tmp_path / "evaluate.yaml")))
    assert len(systems) >= 7 and len(sweep.chosen) >= 5


def documented_programs():
    """Every `python recipes/…` of the pages, with its arguments; a line break inside backticks is a space."""
    found = []
    for page in (RECIPES / "README.md", RECIPES / "nano" / "README.md"):
        text = page.read_text(encoding="utf-8")
        inline = [" ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", text)]
        blocks = re.findall(r"^(python [^#\n]+)", text, flags=re.MULTILINE)
        found += [shlex.split(line) for line in (*inline, *blocks)]
    return sorted({tuple(line[1:]) for line in found if line[1].startswith("recipes/")})


@pytest.mark.parametrize("line", documented_programs(), ids=" ".join)
def test_documented_programs_take_their_arguments(line, nano_recipe, monkeypatch):
    """Fault: a page that tells to run a program without an argument that it requires."""
    program, *arguments = line
    parse = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def parse_only(parser, argv=None, namespace=None):
        raise Parsed(parse(parser, argv, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    module = importlib.import_module(Path(program).stem)
    assert Path(module.__file__) == RECIPES.parent / program
    with pytest.raises(Parsed):
        module.main(arguments)


def test_the_documented_programs_are_found():
    assert {Path(line[0]).stem for line in documented_programs()} >= {
        "build",
        "verify",
        "estimators",
        "report",
    }


@pytest.mark.parametrize("path", LAUNCH, ids=identity)
def test_launch_configuration_is_accelerates(path):
    """Fault: a key that accelerate does not know; it refuses the file when somebody has waited for a GPU."""
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_machines == 1


def test_prompt_set_is_large_distinct_and_split():
    """Fault: a prompt that is trained on and reported on."""
    splits = {name: load_prompts(RECIPES / "prompts", split=name) for name in ("train", "validation", "test")}
    texts = {name: list(split["prompt"]) for name, split in splits.items()}
    everything = [text for split in texts.values() for text in split]
    assert len(set(everything)) == len(everything) >= 500
    train_genres = set(splits["train"]["genre"])
    unseen = [genre for genre in splits["test"]["genre"] if genre not in train_genres]
    assert len(unseen) == 60


def test_every_metric_is_explained(tmp_path):
    """Fault: a number on somebody's screen that no page tells the meaning of."""
    trainer = tiny_trainer(tmp_path, term_norm_steps=1, max_steps=2, prefix_baseline=True, num_iterations=2)
    trainer.train()
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([^`]+)`", page))
    of_transformers = {"learning_rate", "epoch", "step", "total_flos"}
    missing = []
    for name in {key for entry in trainer.state.log_history for key in entry} - of_transformers:
        if name.startswith("train_"):
            continue  # the summary of transformers
        general = re.sub(r"_\d+$", "_0", name)
        general = re.sub(r"variance_0$", "variance_F", general)
        general = re.sub(r"^rewards/.*/(mean|std)$", "rewards/NAME/mean", general)
        general = re.sub(r"^grad_norm/.*$", "grad_norm/distillation", general)
        if general not in explained:
            missing.append(name)
    assert not missing


@pytest.mark.parametrize("size", SIZES)
def test_stand_in_is_laid_out_like_the_release(standins, size):
    """Fault: the stand-ins test our own saver instead of the released files."""
    folder = Path(standins[size])
    config = AutoConfig.from_pretrained(folder)
    stereo = size.startswith("stereo")
    assert config.decoder.num_codebooks == (8 if stereo else 4)
    assert json.loads((folder / "generation_config.json").read_text())["max_length"] == 1500
    assert (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").exists()
    policy = load_policy(folder)
    assert policy.generation_config.guidance_scale == 3.0
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
