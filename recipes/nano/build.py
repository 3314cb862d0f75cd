"""Rebuild the nano world with one command: notes → audio → codec → language model → judges and embedders.

    python recipes/nano/build.py --notes lieder.jsonl.gz --work runs/nano

Stages run in order; each resumes where it stopped and does nothing when its output is there. `--stages` picks some:
codec's vocoder and the language model only need the codes and may run side by side in two processes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from diverse_cfg.settings import field_types, read_settings, require_type

STAGES = ("render", "quantizer", "codes", "vocoder", "encoder", "language-model", "judges", "assemble")


@dataclass
class BuildConfig:
    notes: str = "lieder.jsonl.gz"
    soundfont: str = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
    work: str = "runs/nano"
    seed: int = 0
    workers: int = 2
    threads: int = 1
    recordings: dict[str, int] = field(
        default_factory=lambda: {"train": 14000, "validation": 600, "test": 600}
    )
    output: str = "diverse_cfg/assets/nano"
    batch: int = 24
    judge_steps: int = 1500
    embedder_steps: int = 500
    vocoder: dict[str, float] = field(default_factory=dict)
    encoder: dict[str, float] = field(default_factory=dict)
    language_model: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> BuildConfig:
        """Read a YAML file; an unknown key is an error that lists the known ones."""
        if not path.is_file():
            raise FileNotFoundError(f"no recipe at {path}")
        values, types = read_settings(path), field_types(cls)
        unknown = sorted(set(values) - set(types))
        if unknown:
            raise ValueError(f"{path}: unknown key(s) {', '.join(unknown)}; known: {', '.join(types)}")
        for name, value in values.items():
            require_type(f"{path}: {name}", value, types[name])
        return cls(**values)


def render_stage(config: BuildConfig, work: Path) -> None:
    from notes import read_songs
    from render import render_split, require_fluidsynth

    splits = [s for s in config.recordings if not (work / "audio" / s / "recordings.jsonl").is_file()]
    if not splits:
        return
    require_fluidsynth(config.soundfont)
    songs = read_songs(config.notes)
    for split in splits:
        count = config.recordings[split]
        render_split(songs, split, count, work / "audio", config.soundfont, config.seed, config.workers)


def training_stage(stage: str, config: BuildConfig, work: Path) -> None:
    from codec import build_codec, fit_quantizer, train_encoder, train_vocoder, write_codes
    from data import Clips
    from language_model import build_language_model, build_tokenizer, train_language_model
    from training import Schedule

    clips, held_out = Clips(work / "audio" / "train"), Clips(work / "audio" / "validation")
    quantizer = fit_quantizer(clips, work / "quantizer.pt", config.seed)
    if stage == "quantizer":
        return
    codes = write_codes(clips, quantizer, work / "codes_train.npy")
    held_codes = write_codes(held_out, quantizer, work / "codes_validation.npy")
    schedule = Schedule(**getattr(config, stage.replace("-", "_"))) if stage != "codes" else None
    if stage == "vocoder":
        train_vocoder(build_codec(quantizer), clips, codes, held_out, held_codes, schedule, work, config.seed)
    elif stage == "encoder":
        train_encoder(
            build_codec(quantizer), clips, held_out, held_codes, quantizer, schedule, work, config.seed
        )
    elif stage == "language-model":
        tokenizer = build_tokenizer()
        model = build_language_model(tokenizer)
        train_language_model(
            model, tokenizer, clips, codes, held_out, held_codes, schedule, work, config.seed, config.batch
        )


def judges_stage(config: BuildConfig, work: Path) -> None:
    import numpy as np
    import torch
    from codec import build_codec, decode_clips
    from data import Clips
    from judges import ENCODERS, retrieval, train_encoder, train_judge
    from tqdm import tqdm

    clips, held_out = Clips(work / "audio" / "train"), Clips(work / "audio" / "validation")
    codes, held_codes = (np.load(work / f"codes_{split}.npy") for split in ("train", "validation"))
    if not (work / "judge").is_dir():
        if not (work / "vocoder.pt").is_file():
            raise FileNotFoundError(f"no {work / 'vocoder.pt'}: run the stage `vocoder` first")
        codec = build_codec(torch.load(work / "quantizer.pt", weights_only=True)).eval()
        codec.decoder.load_state_dict(torch.load(work / "vocoder.pt", weights_only=True)["average"])
        chosen = np.random.default_rng([config.seed, 11]).choice(
            len(clips), min(3000, len(clips)), replace=False
        )
        decoded = decode_clips(codec, codes, chosen)
        train_judge(clips, held_out, decoded, config.seed, config.judge_steps).save_pretrained(work / "judge")
    for name in ENCODERS:
        if not (work / name).is_dir():
            embedder = train_encoder(name, clips, codes, config.seed, config.embedder_steps)
            tqdm.write(f"{name}: retrieval@1 of 64 = {retrieval(name, embedder, held_out, held_codes):.3f}")
            embedder.save_pretrained(work / name)


def run_stage(stage: str, config: BuildConfig) -> None:
    import torch

    torch.set_num_threads(config.threads)
    work = Path(config.work)
    if stage == "render":
        render_stage(config, work)
    elif stage == "judges":
        judges_stage(config, work)
    elif stage == "assemble":
        from assemble import write_assets

        quantizer = torch.load(work / "quantizer.pt", weights_only=True)
        write_assets(work, quantizer, Path(config.output), config.seed)
    else:
        training_stage(stage, config, work)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("build.yaml"))
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    for name in ("notes", "soundfont", "work", "output"):
        parser.add_argument(f"--{name}", help=f"overrides `{name}` of the recipe")
    parser.add_argument("--threads", type=int, help="torch threads")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = BuildConfig.load(arguments.config)
        for name in ("notes", "soundfont", "work", "output", "threads"):
            if getattr(arguments, name) is not None:
                setattr(config, name, getattr(arguments, name))
        for stage in STAGES:
            if stage in arguments.stages:
                run_stage(stage, config)
    except (ValueError, FileNotFoundError) as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
