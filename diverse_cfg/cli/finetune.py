"""`diverse-cfg finetune`: a base of your own, from recordings with captions; `diverse-cfg train` distils it.

The command only parses, builds, trains and saves, on several devices too: see `train`.
"""

import argparse
import contextlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diverse_cfg.atomic import alone, write_text
from diverse_cfg.cli import launch
from diverse_cfg.cli.command import Command, model_source
from diverse_cfg.cli.train import LoraArguments, checkpoint_of, lora_of, parse_settings, recipes_as_files

logger = logging.getLogger(__name__)

USAGE = (
    "diverse-cfg finetune [--recipe NAME | --config recipe.yaml] --model_name_or_path MODEL --dataset_name RECORDINGS "
    "--output_dir FOLDER [--setting value …]"
)


@dataclass
class FinetuneArguments(LoraArguments):
    """What `MusicSFTConfig` does not hold: model, recordings and LoRA."""

    model_name_or_path: str = field(
        metadata={"help": "What to start from: Hub id, folder, or `nano` for the shipped base."}
    )
    dataset_name: str = field(
        metadata={
            "help": "Recordings: a folder of audio with each caption in a .txt or .json beside its file; a table with "
            "a column of paths (.csv, .json, .jsonl, .parquet, AudioCraft's manifest); a Hub dataset with audio."
        }
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a dataset with several."})
    dataset_caption_column: str | None = field(
        default=None,
        metadata={"help": "Column of the captions, or key in JSON files. Default: prompt, or description."},
    )
    dataset_caption: str | None = field(
        default=None, metadata={"help": "Caption of all files that have none beside them."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Recordings to evaluate on. Default: held_out of dataset_name's."}
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """None here: TRL's parser knows them, and importing it takes seconds."""


def _run(args: argparse.Namespace) -> None:
    if launch.wanted(args.rest):
        return launch.launch("finetune", recipes_as_files(args.rest))

    from diverse_cfg.config import MusicSFTConfig

    own, config = parse_settings("finetune", USAGE, FinetuneArguments, MusicSFTConfig, args.rest)
    config.resume_from_checkpoint = checkpoint_of(config)  # before anything is loaded
    with alone(config.output_dir) if config.process_index == 0 else contextlib.nullcontext():
        _finetune(own, config)
    if config.process_index == 0:
        print(config.output_dir)


def _finetune(args: FinetuneArguments, config) -> None:
    from diverse_cfg.recordings import find_recordings
    from diverse_cfg.trainer import MusicSFTTrainer

    held_out = args.eval_dataset_name
    if held_out and os.path.realpath(held_out) == os.path.realpath(args.dataset_name):
        raise ValueError(
            f"eval_dataset_name={held_out}: it would be evaluated on what it trains on; name other "
            "recordings, or leave it out"
        )

    def found(source: str, **options: str):
        how: Any = {"column": args.dataset_caption_column, "caption": args.dataset_caption}
        return find_recordings(source, split=args.dataset_train_split, **how, **options)

    trainer = MusicSFTTrainer(
        model_source(args.model_name_or_path),
        args=config,
        train_dataset=found(args.dataset_name),
        eval_dataset=held_out and found(held_out, default_split=args.dataset_train_split),
        peft_config=lora_of(args),
    )
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.held_out and evaluated[-1:] != [trainer.state.global_step]:
        trainer.evaluate()
    trainer.save_state()
    trainer.save_model()
    if config.process_index == 0:
        _write_facts(trainer, config)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _write_facts(trainer, config) -> None:
    """Beside the model: what it was trained on, and its captions as prompts for `diverse-cfg train`."""
    from diverse_cfg.cards import public_name
    from diverse_cfg.provenance import library_versions

    folder, parts = Path(config.output_dir), {"train": trainer.recordings, "validation": trainer.held_out}
    for split, recordings in parts.items():
        if recordings:
            lines = "".join(f"{recording.caption}\n" for recording in recordings)
            write_text(folder / "prompts" / f"{split}.txt", lines)
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    names = ("learning_rate", "text_dropout", "held_out", "quick", "seed")
    facts = {
        "base_model": public_name(trainer.base_model),
        "steps": trainer.state.global_step,
        "recordings": {split: len(recordings) for split, recordings in parts.items()},
        **{name: getattr(config, name) for name in names},
        "evaluations": [measured[0], measured[-1]] if measured else [],
        "versions": library_versions(),
    }
    write_text(folder / "finetune.json", json.dumps(facts, indent=2) + "\n")
    if measured:
        first, last = measured[0], measured[-1]
        logger.info(
            "%s: loss %.3f → %.3f nats per code, without text %.3f → %.3f",
            "the overfitted recording" if config.quick else "held-out recordings",
            *(entry[name] for name in ("eval_loss", "eval_loss/no_text") for entry in (first, last)),
        )


COMMAND = Command(
    name="finetune",
    summary="train a base on your own recordings, as the teacher of what follows",
    add_arguments=_add_arguments,
    run=_run,
    resume="continue from the last checkpoint with --resume_from_checkpoint true",
    parses_rest=True,
)
