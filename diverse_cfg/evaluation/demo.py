"""The whole method in one command, on the shipped base: distil, diversify, merge, generate, measure, listen.

The stages are the ones that anybody runs by hand: `CFGDiversityTrainer` twice (first `diversity_coef = 0`,
then, continuing from that student, with the diversity reward), `merge_checkpoints`, and a `Sweep`. The
output of each is complete or absent, training resumes from its checkpoint and evaluation from its cache, so
that the command can be interrupted and run again at any time.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from diverse_cfg import __version__
from diverse_cfg.assets import nano_path
from diverse_cfg.atomic import alone, write_text
from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.evaluation.cache import content_digest
from diverse_cfg.evaluation.gallery import Picture, write_audio, write_gallery
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep
from diverse_cfg.evaluation.report import QUALITIES, draw, first_metric, update_card
from diverse_cfg.evaluation.results import Results
from diverse_cfg.evaluation.systems import System, single
from diverse_cfg.merging import merge_checkpoints
from diverse_cfg.plotting import training_curves
from diverse_cfg.prompts import load_prompts
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer

logger = logging.getLogger(__name__)

SETTINGS_FILE = "demo.json"
MERGES = "students and their merges"
_SHOWN = (
    "adherence",
    "rules",
    "diversity_heldout",
    "diversity_reward",
    "vendi_heldout",
    "kl_teacher",
    "validity",
    "decoder_rows",
)


@dataclass(frozen=True)
class World:
    """What the demo starts from: by default the parts that are shipped.

    Args:
        base: MusicGen folder.
        prompts: folder with the splits train and test.
        reward_encoder: encoder of the diversity reward.
        heldout_encoder: encoder that only measures.
        judge: attribute judge.
    """

    base: str = field(default_factory=lambda: str(nano_path()))
    prompts: str = field(default_factory=lambda: str(nano_path("prompts")))
    reward_encoder: str = field(default_factory=lambda: str(nano_path("reward-encoder")))
    heldout_encoder: str = field(default_factory=lambda: str(nano_path("eval-encoder")))
    judge: str = field(default_factory=lambda: str(nano_path("judge")))


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo.

    Args:
        seed: of both trainings; clips are played with seed 0 always, so that runs can be compared.
        guidance_scale: γ of the teacher.
        diversity_coef: β of the diversity student, for clips of the base's length.
        quality_steps: updates of the student without diversity reward.
        diversity_steps: updates of the student that continues from it.
        quality_learning_rate: peak of the cosine schedule.
        diversity_learning_rate: the same, of the second training.
        prompts_per_step: P of an update.
        num_generations: G of an update.
        merge_weights: λ of the merges.
        guidance_scales: γ at which the base is measured, beside 1.
        num_prompts: held-out prompts.
        num_clips: clips of each held-out prompt.
        gallery_prompts: prompts on the page.
        gallery_clips: clips of each of them.
    """

    seed: int = 0
    guidance_scale: float = 3.0
    diversity_coef: float = 60.0
    quality_steps: int = 120
    diversity_steps: int = 120
    quality_learning_rate: float = 7e-4
    diversity_learning_rate: float = 5e-4
    prompts_per_step: int = 8
    num_generations: int = 8
    merge_weights: tuple[float, ...] = (0.25, 0.5, 0.75)
    guidance_scales: tuple[float, ...] = (2.0, 3.0)
    num_prompts: int = 36
    num_clips: int = 8
    gallery_prompts: int = 4
    gallery_clips: int = 4

    @classmethod
    def quick(cls, seed: int = 0) -> "DemoSettings":
        """A smoke run: everything happens, nothing is learnt."""
        return cls(
            seed=seed,
            quality_steps=12,
            diversity_steps=6,
            prompts_per_step=4,
            num_generations=4,
            merge_weights=(0.5,),
            guidance_scales=(3.0,),
            num_prompts=8,
            num_clips=4,
            gallery_prompts=2,
            gallery_clips=2,
        )

    @property
    def minutes(self) -> float:
        """Expected time on two idle cores; of this, training is most."""
        clips = self.prompts_per_step * self.num_generations
        steps = (self.quality_steps + self.diversity_steps) * clips / 64
        systems = 3 + len(self.guidance_scales) + len(self.merge_weights)
        return (
            steps * _SECONDS_PER_STEP + systems * self.num_prompts * self.num_clips * _SECONDS_PER_CLIP + 15
        ) / 60


# Measured on two idle cores: an update of 64 clips of 3 s, and sampling, decoding and judging one clip.
_SECONDS_PER_STEP = 1.2
_SECONDS_PER_CLIP = 0.05


def run_demo(
    output: str | os.PathLike,
    settings: DemoSettings | None = None,
    world: World | None = None,
    *,
    tell: Callable[[str], None] = logger.info,
) -> Results:
    """Run the demo, or what is missing of it.

    Args:
        output: folder; a new one, an empty one, or one that the same settings have begun.
        settings: sizes; the defaults take about a quarter of an hour.
        world: what it starts from; the shipped parts by default.
        tell: is called with lines for a person.

    Returns:
        The results, which are also in the folder, with figures and `index.html`.

    Raises:
        FileExistsError: the folder holds something else.
        FileNotFoundError: a part of the base is missing.
    """
    settings, world, output = settings or DemoSettings(), world or World(), Path(output)
    _open(output, settings, world)
    with alone(output):
        return _run(output, settings, world, tell)


def _run(output: Path, settings: DemoSettings, world: World, tell: Callable[[str], None]) -> Results:
    minutes = max(1, round(settings.minutes))
    tell(
        f"Plan: a quality student ({settings.quality_steps} updates), a diversity student "
        f"({settings.diversity_steps} more), {len(settings.merge_weights)} merges, then "
        f"{settings.num_clips} clips for each of {settings.num_prompts} held-out prompts per system: about "
        f"{minutes} min on two idle cores. Ctrl-C is safe: run it again to go on."
    )
    quality = _train(output, "quality", world.base, 0.0, settings, world)
    diversity = _train(output, "diversity", str(quality), settings.diversity_coef, settings, world)
    merges = _merge(output, quality, diversity, settings)
    results = _evaluate(output, quality, diversity, merges, settings, world)
    tell("\n" + results.table([name for name in _SHOWN if name in results.metrics]))
    tell("\n" + "\n".join(findings(results, settings)))
    tell(f"\nOpen {(output / 'index.html').resolve()} to look and listen.")
    return results


def findings(results: Results, settings: DemoSettings) -> list[str]:
    """What the numbers say about the promise, in sentences with intervals."""
    quality = first_metric(results, QUALITIES)
    guided = f"base γ={settings.guidance_scale:g}"
    names = {row.system.name for row in results.usable}
    lines = []
    for system, other, metric in (
        ("quality student", guided, quality),
        ("quality student", guided, "diversity_heldout"),
        ("diversity student", "quality student", "diversity_heldout"),
        ("diversity student", "base", quality),
    ):
        if metric and {system, other} <= names and metric in results[system].cells:
            difference = results.difference(system, other, metric)
            verdict = "" if difference.excludes_zero else " (no clear difference)"
            lines.append(f"{system} − {other}, {METRICS[metric].label}: {difference.text()}{verdict}")
    return lines


# ---- the folder ----------------------------------------------------------------------------------


def _open(output: Path, settings: DemoSettings, world: World) -> None:
    """Make the folder, or check that it is the one to go on with."""
    identity = {
        "version": __version__,
        "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items()},
        "base": content_digest(world.base),
        "encoders": [content_digest(world.reward_encoder), content_digest(world.heldout_encoder)],
        "judge": content_digest(world.judge),
    }
    path = output / SETTINGS_FILE
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()):
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            raise FileExistsError(f"{output} is not empty and no demo: choose another --output") from None
        if begun != identity:
            changed = [key for key in identity if begun.get(key) != identity[key]]
            raise FileExistsError(
                f"{output} was begun with other {' and '.join(changed)}: choose another --output, or remove it"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(identity, indent=1) + "\n")


# ---- training ------------------------------------------------------------------------------------


def _train(
    output: Path, name: str, model: str, diversity_coef: float, settings: DemoSettings, world: World
) -> Path:
    """One student, complete in `output/name`; the run itself is in `output/training/name`."""
    student, run = output / name, output / "training" / name
    if student.is_dir():
        return student
    config = training_config(run, name, diversity_coef, settings, world)
    trainer = CFGDiversityTrainer(
        model,
        args=config,
        train_dataset=load_prompts(world.prompts, split="train"),
        # Also without a coefficient: then it is only logged.
        reward_funcs=[DiversityReward(world.reward_encoder)],
        callbacks=[Bar(f"train the {name} student", config.max_steps)],
    )
    trainer.remove_callback(PrinterCallback)  # the bar says what there is to say
    trainer.train(resume_from_checkpoint=_last_checkpoint(run))
    trainer.save_state()
    incomplete = output / f".{name}.incomplete"
    shutil.rmtree(incomplete, ignore_errors=True)
    trainer.save_model(str(incomplete))
    incomplete.rename(student)
    for checkpoint in run.glob("checkpoint-*"):  # they are several times the student's size
        shutil.rmtree(checkpoint)
    return student


def _last_checkpoint(run: Path) -> str | None:
    """The newest complete checkpoint: one that was being written when the run was killed lacks its last file."""
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in [path for path in checkpoints if not (path / TRAINER_STATE_NAME).is_file()]:
        shutil.rmtree(checkpoint)
        checkpoints.remove(checkpoint)
    return str(checkpoints[-1]) if checkpoints else None


def training_config(
    run: Path, name: str, diversity_coef: float, settings: DemoSettings, world: World
) -> CFGDiversityConfig:
    """The recipe of a student: the same for both but for the reward, the length and the learning rate."""
    steps = settings.diversity_steps if diversity_coef else settings.quality_steps
    return CFGDiversityConfig(
        output_dir=str(run),
        guidance_scale=settings.guidance_scale,
        diversity_coef=diversity_coef,
        diversity_embedder=world.reward_encoder,
        # The teacher is the base, also of the student that continues from another.
        teacher_model=world.base,
        num_generations=settings.num_generations,
        per_device_train_batch_size=settings.prompts_per_step * settings.num_generations,
        max_steps=steps,
        learning_rate=settings.diversity_learning_rate if diversity_coef else settings.quality_learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(10, max(1, steps // 4)),
        weight_decay=0.0,
        max_grad_norm=0.0,
        adaptive_clip=1.5,
        ema_decay=0.98,
        prefix_baseline=diversity_coef > 0,
        prefix_lambda=0.6,
        diversity_codebooks=1,  # with λ < 1: the most signal per batch, see recipes/nano/README.md
        temperature=1.0,
        seed=settings.seed,
        save_strategy="steps",
        save_steps=max(2, steps // 6),
        save_total_limit=1,
        logging_steps=max(1, steps // 60),
        report_to=[],
        disable_tqdm=True,
        audio_samples=0,
    )


class Bar(TrainerCallback):
    """A progress bar that says what training is about: KL to the teacher, and diversity."""

    def __init__(self, description: str, total: int):
        self.description, self.total = description, total
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=self.total, initial=state.global_step, desc=self.description, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"kl/clip": "KL", "reward/diversity": "diversity"}
        shown: dict[str, Any] = {label: logs[name] for name, label in names.items() if logs and name in logs}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


# ---- merging and evaluation ----------------------------------------------------------------------


def _merge(output: Path, quality: Path, diversity: Path, settings: DemoSettings) -> dict[float, Path]:
    folders = {}
    for weight in tqdm(settings.merge_weights, desc="merge the students", unit="model"):
        folders[weight] = output / "merges" / f"weight-{weight:g}"
        with suppress(FileExistsError):  # it is there already, and only ever complete
            merge_checkpoints([quality, diversity], weight, folders[weight])
    return folders


def _evaluate(
    output: Path,
    quality: Path,
    diversity: Path,
    merges: dict[float, Path],
    settings: DemoSettings,
    world: World,
) -> Results:
    base = "base, guidance γ"
    systems: list[dict[str, Any]] = [{"name": "base", "model": world.base, "role": "base", "series": base}]
    systems += [
        {"name": f"base γ={scale:g}", "model": world.base, "guidance_scale": scale, "series": base}
        for scale in settings.guidance_scales
    ]
    students: list[tuple[str, float, Path]] = [("quality student", 0.0, quality)]
    students += [(f"merge λ={weight:g}", weight, folder) for weight, folder in merges.items()]
    students.append(("diversity student", 1.0, diversity))
    config = SweepConfig(
        systems=systems,
        output=str(output),
        prompts=str(_held_out(output, settings, world)),
        num_generations=settings.num_clips,
        teacher=world.base,
        teacher_guidance_scale=settings.guidance_scale,
        judge=world.judge,
        reward_encoder=world.reward_encoder,
        heldout_encoder=world.heldout_encoder,
    )
    sweep, expanded = build_sweep(config)
    expanded += [_student(name, folder, weight) for name, weight, folder in students]
    guided = f"base γ={settings.guidance_scale:g}"
    compare_to = [name for name in ("base", guided) if any(system.name == name for system in expanded)]
    results = sweep.run(expanded, compare_to)
    results.save(output)
    for name, _, folder in students:
        if results[name].ok:
            update_card(results, name, folder, _SHOWN)
    pictures = _draw(output, results)
    files = write_audio(results, sweep, output, settings.gallery_prompts, settings.gallery_clips)
    write_gallery(
        results,
        files,
        output,
        title="Guidance inside the weights, variety kept",
        introduction=(
            f"A small MusicGen, its classifier-free guidance (γ = {settings.guidance_scale:g}) distilled "
            "into a quality student, a diversity student that was also rewarded for clips that differ (β = "
            f"{settings.diversity_coef:g}), and merges of the two. Students and merges need no guidance: "
            "half the decoder rows per clip."
        ),
        metrics=[name for name in _SHOWN if name in results.metrics],
        pictures=pictures,
    )
    return results


def _student(name: str, folder: Path, weight: float) -> System:
    role = "merge" if 0 < weight < 1 else "student"
    return System(name, single(folder), role=role, series=MERGES, merge_weight=weight)


def _held_out(output: Path, settings: DemoSettings, world: World) -> Path:
    """Prompts of the test split, evenly spread over it, in a file of their own."""
    prompts = list(dict.fromkeys(load_prompts(world.prompts, split="test")["prompt"]))
    if len(prompts) < settings.num_prompts:
        raise ValueError(
            f"{world.prompts} has {len(prompts)} test prompts, the demo wants {settings.num_prompts}"
        )
    chosen = [prompts[index * len(prompts) // settings.num_prompts] for index in range(settings.num_prompts)]
    return write_text(output / "held-out-prompts.txt", "\n".join(chosen) + "\n")


def _draw(output: Path, results: Results) -> list[Picture]:
    pictures = draw(results, output)
    runs = {f"{name} student": output / "training" / name for name in ("quality", "diversity")}
    training_curves(runs, output / "training-curves", smooth=10)
    caption = "Training: divergence from the guided teacher, and the diversity reward."
    return [*pictures, Picture("training-curves.svg", caption)]
