"""`diverse-cfg train`: a student from prompts, set up by flags or a YAML recipe as with TRL's own scripts.

The command only parses, builds, trains and saves. On several devices it is the same program, which
`--accelerate_config` or `--num_processes` launches by accelerate (`cli/launch.py`).
"""

import argparse
import contextlib
import difflib
import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diverse_cfg.assets import recipe_path, shipped_embedder
from diverse_cfg.atomic import alone
from diverse_cfg.cli import launch
from diverse_cfg.cli.command import Command, model_source, prompt_source

logger = logging.getLogger(__name__)

USAGE = (
    "diverse-cfg train [--recipe NAME | --config recipe.yaml] [--accelerate_config NAME --num_processes N …] "
    "--model_name_or_path MODEL --dataset_name PROMPTS --output_dir FOLDER [--setting value …]"
)
DESCRIPTION = (
    "Recipes and launch configurations that are installed: `diverse-cfg recipes`. What is typed beside a recipe wins. "
    "With --accelerate_config or --num_processes the command starts itself by accelerate, whose options can be typed "
    "too (`accelerate launch --help`)."
)

FACETS = ("melody", "rhythm", "pitch", "timbre", "level")  # `facets.REWARDED_FACETS`, without loading torch
REWARDS = (
    *("text_adherence", "aesthetics_ce", "aesthetics_cu", "aesthetics_pc", "aesthetics_pq"),
    *(f"diversity_{facet}" for facet in FACETS),
)

# Any of these packages serves the tracker.
_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


@dataclass(kw_only=True)
class LoraArguments:
    """LoRA, named as in TRL's scripts."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter is lora_alpha / lora_r."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt. Default: the decoder's own projections."}
    )


@dataclass
class TrainArguments(LoraArguments):
    """What `CFGDiversityConfig` does not hold: model, prompts and LoRA, named as in TRL's scripts."""

    model_name_or_path: str = field(
        metadata={"help": "Student's start and teacher: Hub id, folder, or `nano` for the shipped base."}
    )
    dataset_name: str = field(
        metadata={
            "help": "Prompts: Hub dataset id, folder, file, or `nano` or `nano-open`: the shipped ones."
        }
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the prompts to train on."})
    dataset_prompt_column: str | None = field(
        default=None, metadata={"help": "Column that holds the prompts. Default: prompt."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out prompts. Default: dataset_name, if dataset_test_split is set."},
    )
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split of the held-out prompts."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards beside diversity: text_adherence (CLAP), aesthetics_ce, _cu, _pc or _pq; or one facet's "
            "diversity, diversity_melody, _rhythm, _pitch, _timbre or _level, by rules, with diversity_coef too. "
            "With reward_weights, the diversity reward comes first; it and the facets have weight 1."
        },
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """None here: TRL's parser knows them, and importing it takes seconds."""


def _run(args: argparse.Namespace) -> None:
    if launch.wanted(args.rest):
        return launch.launch("train", recipes_as_files(args.rest))

    from diverse_cfg.config import CFGDiversityConfig

    train_args, config = parse_settings("train", USAGE, TrainArguments, CFGDiversityConfig, args.rest)
    train(train_args, config)
    if config.process_index == 0:
        print(config.output_dir)


def parse_settings(command: str, usage: str, own: type, config: type, rest: list[str]) -> tuple[Any, Any]:
    """Settings of a trainer from flags and a recipe, by TRL's parser.

    Args:
        command: its name.
        usage: its first line of help.
        own: dataclass of what the trainer's configuration does not hold.
        config: the trainer's configuration.
        rest: the command line.

    Raises:
        ValueError: a setting that does not exist, or a value of another type; or LoRA's settings without LoRA.
    """
    from trl import TrlParser

    from diverse_cfg.effects import idle_settings
    from diverse_cfg.settings import field_types, read_settings, require_type

    # TRL's annotation does not see that both are dataclasses.
    kinds: Any = (own, config)
    prog = f"diverse-cfg {command}"
    parser = TrlParser(
        kinds,
        prog=prog,
        usage=usage,
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    _own_settings_first(parser, own, config)
    if "--guidance_scale" in parser._option_string_actions:  # a number, or a range that the settings read
        parser._option_string_actions["--guidance_scale"].type = str
    words, recipe = recipes_as_files(rest), {}
    if "--config" in words:
        recipe = read_settings(words[words.index("--config") + 1])
    typed = [word.partition("=")[0] for word in words if word.startswith("--")]
    _check_names([*typed, *(f"--{name}" for name in recipe if name != "env")], parser, command)
    annotations = field_types(own) | field_types(config)
    for name in [name for name in recipe if name != "env"]:
        if name not in annotations:  # another spelling of a command line
            spelling = parser._option_string_actions[f"--{name}"].dest
            raise ValueError(f"a recipe has no setting {name}; did you mean {spelling}?")
        require_type(name, recipe[name], annotations[name])
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # of settings without effect, also when asked for again
        own_args, settings = parser.parse_args_and_config(words)
    _check_trackers(settings.report_to or [])
    if idle := idle_settings(own_args):  # LoRA's, without which all weights would be trained
        raise ValueError("; ".join(idle))
    return own_args, settings


def recipes_as_files(rest: list[str]) -> list[str]:
    """The command line as TRL's parser reads it, which knows neither `--config=FILE` nor recipes by name."""
    words = []
    for word in rest:
        words += word.split("=", 1) if word.startswith(("--config=", "--recipe=")) else [word]
    words = ["--config" if word == "--recipe" else word for word in words]
    if words and words[-1] == "--config":
        raise ValueError("--config needs the path of a YAML file, --recipe its name (diverse-cfg recipes)")
    if words.count("--config") > 1:
        raise ValueError("--config is given twice: put all settings into one file")
    if "--config" in words:
        place = words.index("--config") + 1
        words[place] = recipe_path(words[place])
    return words


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default, but not that it is None: what happens then is in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _own_settings_first(parser: argparse.ArgumentParser, own: type, config: type) -> None:
    """What this method adds or changes before the two hundred settings of a trainer; `output_dir` is asked
    for."""
    names = {"output_dir", *(item.name for item in fields(own)), *config.__annotations__}
    ours, theirs = parser.add_argument_group("this method"), parser._optionals
    for action in [action for action in theirs._group_actions if action.dest in names]:
        theirs._group_actions.remove(action)
        ours._group_actions.append(action)
        action.required |= action.dest == "output_dir"
    theirs.title = "TRL's and transformers'"
    parser._action_groups.remove(ours)
    parser._action_groups.insert(0, ours)


def _check_names(names: list[str], parser: argparse.ArgumentParser, command: str) -> None:
    known = {"--config", *parser._option_string_actions}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"see diverse-cfg {command} --help"
            raise ValueError(f"{command} has no setting {name}; {remedy}")


def _check_trackers(names: list[str]) -> None:
    for name in names:
        packages = _TRACKERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise ValueError(
                f"report_to={name} needs the package {packages[0]}: pip install {packages[0]}, or choose "
                "another (none: --report_to none)"
            )


def train(args: TrainArguments, config, callbacks: Sequence[Any] = ()) -> None:
    """Build the trainer, train or continue, and write the student to `config.output_dir`, its card last.

    Args:
        args: model, prompts, rewards and LoRA.
        config: a `CFGDiversityConfig`.
        callbacks: for the trainer; with any, logs are not printed beside what they show.
    """
    config.resume_from_checkpoint = checkpoint_of(config)  # before anything is loaded
    with alone(config.output_dir) if config.process_index == 0 else contextlib.nullcontext():
        _train(args, config, callbacks)


def _train(args: TrainArguments, config, callbacks: Sequence[Any]) -> None:
    unknown = [name for name in args.reward_funcs or () if name not in REWARDS]
    if unknown:
        raise ValueError(f"reward_funcs has no {', '.join(unknown)}; known: {', '.join(REWARDS)}")
    from transformers import PrinterCallback

    from diverse_cfg.prompts import load_prompts
    from diverse_cfg.trainer import CFGDiversityTrainer

    model = model_source(args.model_name_or_path)
    _resolve_nano(config)
    source = prompt_source(args.dataset_name)
    if args.dataset_train_split != "train" and Path(source).is_file():
        raise ValueError(
            f"dataset_train_split={args.dataset_train_split}: the file {source} has no splits; leave it out"
        )
    prompts = load_prompts(source, split=args.dataset_train_split, column=args.dataset_prompt_column)
    trainer = CFGDiversityTrainer(
        model,
        reward_funcs=_rewards(args, config, model),
        args=config,
        train_dataset=prompts,
        eval_dataset=_held_out(args),
        peft_config=lora_of(args),
        callbacks=list(callbacks),
    )
    if callbacks:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card(dataset_name=args.dataset_name)
    # Left to the interpreter's exit, or while another process still talks, gloo's threads now and then abort.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def lora_of(args: LoraArguments) -> Any:
    """The adapter that is asked for; None for all weights."""
    if not args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=args.lora_target_modules)


def _resolve_nano(config) -> None:
    """Replace nano's own names in the settings by the folders that they stand for, in place."""
    if config.teacher_model is not None:
        config.teacher_model = model_source(config.teacher_model)
    for name in ("diversity_embedder", "monitor_embedder"):
        if (value := getattr(config, name)) is not None:
            setattr(config, name, shipped_embedder(value))


def _rewards(args: TrainArguments, config, model: str):
    """The named reward functions after the diversity reward; None leaves the choice to the trainer."""
    from diverse_cfg.facets import FacetReward
    from diverse_cfg.rewards import AestheticsReward, TextAdherenceReward
    from diverse_cfg.trainer.setup import default_reward

    if not args.reward_funcs:  # with an encoder but no coefficient, diversity is only logged
        only_logged = not config.diversity_coef and config.diversity_embedder
        return [default_reward(config, model)] if only_logged else None
    rewards: list[Any] = [default_reward(config, model)] if config.diversity_coef > 0 else []
    for name in args.reward_funcs:
        if name.startswith("diversity_"):
            rewards.append(FacetReward(name.removeprefix("diversity_"), config.guards))
        elif name == "text_adherence":
            rewards.append(TextAdherenceReward())
        else:
            rewards.append(AestheticsReward(axis=name.removeprefix("aesthetics_").upper()))
    return rewards


def _held_out(args: TrainArguments):
    from diverse_cfg.prompts import load_prompts

    if args.eval_dataset_name is None and args.dataset_test_split is None:
        return None
    source = prompt_source(args.eval_dataset_name or args.dataset_name)
    if args.eval_dataset_name is None and Path(source).is_file():
        raise ValueError(
            f"dataset_test_split={args.dataset_test_split}: the file {source} has no splits, so it would be "
            "evaluated on what it trains on; name held-out prompts with eval_dataset_name"
        )
    if args.dataset_test_split not in (None, "test") and Path(source).is_file():
        raise ValueError(
            f"dataset_test_split={args.dataset_test_split}: the file {source} has no splits; leave it out"
        )
    split = args.dataset_test_split or "test"
    trains_on = prompt_source(args.dataset_name)
    seen = os.path.realpath(source) == os.path.realpath(trains_on)
    if seen and split == args.dataset_train_split:
        raise ValueError(
            f"dataset_test_split={split}: it would be evaluated on what it trains on, the same split of {source}; name "
            "another, or held-out prompts with eval_dataset_name"
        )
    # Of what it trains on only a split of its own is held out.
    usual = "train" if seen else "test"
    return load_prompts(source, split=split, column=args.dataset_prompt_column, default_split=usual)


def checkpoint_of(config) -> str | None:
    """Where to continue; None to begin. A folder with something in it is not written over by accident."""
    from diverse_cfg.reading import last_checkpoint

    wanted = config.resume_from_checkpoint
    output = Path(config.output_dir)
    if wanted and str(wanted).lower() not in ("true", "false"):
        if not Path(wanted).is_dir():
            raise ValueError(
                f"resume_from_checkpoint={wanted!r} is not a folder; pass true for the last checkpoint"
            )
        return str(wanted)
    if wanted and str(wanted).lower() == "true":
        last = last_checkpoint(output)
        if last is None and config.process_index == 0:
            logger.info(
                "resume_from_checkpoint=true: %s holds no complete checkpoint, so the run begins anew", output
            )
        return last
    # Only one process looks: another may already have begun to write.
    if config.process_index == 0 and output.is_dir() and any(output.iterdir()):
        raise FileExistsError(
            f"output_dir {output} is not empty; add --resume_from_checkpoint true, or choose another"
        )
    return None


COMMAND = Command(
    name="train",
    summary="train a student that needs no guidance: CFG distillation with a diversity reward",
    add_arguments=_add_arguments,
    run=_run,
    resume="continue from the last checkpoint with --resume_from_checkpoint true",
    parses_rest=True,
)
