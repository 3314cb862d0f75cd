"""`diverse-cfg demo`: the whole method on the shipped base: distil, diversify, merge, measure, listen.

It runs the recipes of `assets/demo` by the functions of the commands train, merge and evaluate. Training resumes
from its checkpoint and evaluation from its cache, so that it can be interrupted and run again at any time.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diverse_cfg.atomic import alone, write_text
from diverse_cfg.cli.command import SEED, Command, prompt_source
from diverse_cfg.cli.quiet import quiet_libraries
from diverse_cfg.settings import read_settings

if TYPE_CHECKING:
    from diverse_cfg.evaluation.results import Results

logger = logging.getLogger(__name__)

SETTINGS_FILE = "demo.json"
_SHIPPED = Path(__file__).parent.parent / "assets" / "demo"
_FOLDER = "demo-run"  # in the shipped recipes
_SHOWN = (
    "adherence",
    "clean_heldout",
    "clean_melody",
    "clean_rhythm",
    "dying",
    "kl_teacher",
    "decoder_rows",
)
# Measured on two idle cores: an update of 64 clips of 3 s, what rewards and a guard that listen add to it; sampling,
# decoding and judging one clip.
_SECONDS_PER_STEP = 0.8
_SECONDS_TO_LISTEN = 1.1
_SECONDS_PER_CLIP = 0.05

Recipes = dict[str, dict[str, Any]]
"""Settings of the stages `quality` and `diversity` (train), `merge` and `evaluate`, as in their `--config` files."""


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        default=_FOLDER,
        help=f"folder to write; one that the same command has begun is continued (default: {_FOLDER})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run of under two minutes: everything happens, little is learnt",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the trainings (default: 0)")


def run_demo(args: argparse.Namespace) -> None:
    # Importing torch and transformers takes seconds: say something before.
    print("diverse-cfg demo: train, merge, generate, evaluate on the shipped base", flush=True)
    quiet_libraries()
    demo(args.output, shipped_recipes(args.quick, args.seed), tell=lambda line: print(line, flush=True))


def shipped_recipes(quick: bool = False, seed: int = 0) -> Recipes:
    """The recipes that travel with the package.

    Args:
        quick: a smoke run: everything happens, little is learnt.
        seed: of both trainings; clips are sampled with seed 0 always, so that runs can be compared.
    """
    recipes = {
        stage: read_settings(_SHIPPED / f"{stage}.yaml")
        for stage in ("quality", "diversity", "merge", "evaluate")
    }
    if quick:
        smaller = read_settings(_SHIPPED / "quick.yaml")
        systems = [s for s in recipes["evaluate"]["systems"] if s["name"] in smaller["evaluate"]["systems"]]
        smaller["evaluate"]["systems"] = systems
        recipes = {stage: settings | smaller[stage] for stage, settings in recipes.items()}
    for stage in ("quality", "diversity"):
        recipes[stage]["seed"] = seed
    return recipes


def demo(
    output: str | os.PathLike, recipes: Recipes | None = None, *, tell: Callable[[str], None] = logger.info
) -> "Results":
    """Run the demo, or what is missing of it.

    Args:
        output: folder; a new one, an empty one, or one that the same recipes have begun.
        recipes: what is run; `demo-run` in them stands for the folder. The shipped ones take about 7 minutes.
        tell: is called with lines for a person.

    Returns:
        The results, which are also in the folder, with figures and `index.html`.

    Raises:
        FileExistsError: the folder holds something else.
        FileNotFoundError: a part of the base is missing.
    """
    output, recipes = Path(output), recipes or shipped_recipes()
    _open(output, recipes)
    with alone(output):
        tell(_plan(recipes))
        placed = _placed(recipes, str(output))
        for stage in ("quality", "diversity"):
            _train(stage, placed[stage])
        folders = _merge(placed["merge"])
        results = _evaluate(output, placed)
        _write_cards(results, output, folders)
        tell("\n" + results.table([name for name in _SHOWN if name in results.metrics]))
        tell("\n" + "\n".join(findings(results, guided=recipes["evaluate"]["compare_to"][-1])))
        tell(f"\nOpen {(output / 'index.html').resolve()} to look and listen.")
        tell(f"To type a prompt and move λ yourself: diverse-cfg play {shlex.quote(str(output))}")
    return results


def findings(results: "Results", guided: str) -> list[str]:
    """What the numbers say about the promise, in sentences with intervals; `guided` names the guided base."""
    from diverse_cfg.evaluation.metrics import METRICS
    from diverse_cfg.evaluation.report import QUALITIES, first_metric

    quality = first_metric(results, QUALITIES)
    names = {row.system.name for row in results.usable}
    lines = []
    for system, other, metric in (
        ("quality student", guided, quality),
        ("quality student", guided, "clean_heldout"),
        ("diversity student", "quality student", "clean_heldout"),
        ("diversity student", "base", quality),
    ):
        if metric and {system, other} <= names and metric in results[system].cells:
            difference = results.difference(system, other, metric)
            verdict = "" if difference.excludes_zero else " (no clear difference)"
            lines.append(f"{system} − {other}, {METRICS[metric].label}: {difference.text()}{verdict}")
    return lines


def _plan(recipes: Recipes) -> str:
    quality, diversity, evaluation = (recipes[stage] for stage in ("quality", "diversity", "evaluate"))
    seconds = 15.0
    for recipe in (quality, diversity):
        step = _SECONDS_PER_STEP + (_SECONDS_TO_LISTEN if recipe.get("guards") else 0)
        seconds += recipe["max_steps"] * recipe["per_device_train_batch_size"] / 64 * step
    played = len(evaluation["systems"]) * evaluation["num_prompts"] * evaluation["num_generations"]
    seconds += played * _SECONDS_PER_CLIP
    merges = sum(0 < system.get("merge_weight", 0) < 1 for system in evaluation["systems"])
    return (
        f"Plan: a quality student ({quality['max_steps']} updates), a diversity student "
        f"({diversity['max_steps']} more), {merges} merges, then {evaluation['num_generations']} clips for each of "
        f"{evaluation['num_prompts']} held-out prompts per system: about {max(1, round(seconds / 60))} min on two "
        "idle cores. Ctrl-C is safe: run it again to go on."
    )


# ---- the folder ----------------------------------------------------------------------------------


def _open(output: Path, recipes: Recipes) -> None:
    """Make the folder, or check that it is the one to go on with."""
    from diverse_cfg import __version__

    identity = {"version": __version__, "settings": recipes}
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


def _placed(value: Any, output: str) -> Any:
    """The same settings with paths below `output` in the place of `demo-run`."""
    if isinstance(value, Mapping):
        return {key: _placed(inner, output) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, output) for inner in value]
    if isinstance(value, str) and value.split("/")[0] == _FOLDER:
        return output + value.removeprefix(_FOLDER)
    return value


# ---- the stages ----------------------------------------------------------------------------------


def _train(stage: str, settings: Mapping[str, Any]) -> None:
    """One student, by `diverse-cfg train`; its card is written last, and says that it is complete."""
    from transformers import HfArgumentParser

    from diverse_cfg.cards import CARD_FILE
    from diverse_cfg.cli import train
    from diverse_cfg.config import CFGDiversityConfig

    folder = Path(settings["output_dir"])
    if not (folder / CARD_FILE).is_file():
        kinds: Any = (train.TrainArguments, CFGDiversityConfig)
        here = {"resume_from_checkpoint": "true", "disable_tqdm": True, "audio_samples": 0}
        args, config = HfArgumentParser(kinds).parse_dict({**settings, **here})
        train.train(args, config, [_bar(f"train the {stage} student", config.max_steps)])
    for checkpoint in folder.glob("checkpoint-*"):  # they are several times the student's size
        shutil.rmtree(checkpoint)


def _bar(description: str, total: int) -> Any:
    """A progress bar that says what training is about: KL to the teacher, and diversity."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(total=total, initial=state.global_step, desc=description, unit="step")

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs: Any = None, **kwargs):
            names = {"kl/clip": "KL", "reward/diversity": "diversity"}
            self.bar.set_postfix({label: logs[name] for name, label in names.items() if name in logs})

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Bar()


def _merge(settings: Mapping[str, Any]) -> list[Path]:
    """The merges, by `diverse-cfg merge`: those that are there already are kept."""
    from diverse_cfg.cli import merge

    parser = argparse.ArgumentParser()
    merge.add_merge_arguments(parser)
    return merge.merge(argparse.Namespace(**vars(parser.parse_args([])) | settings))


def _evaluate(output: Path, recipes: Recipes) -> "Results":
    """All systems, by `diverse-cfg evaluate`, on a page that says what it shows."""
    from diverse_cfg.evaluation.protocol import SweepConfig
    from diverse_cfg.evaluation.report import Picture, evaluate
    from diverse_cfg.plotting import training_curves

    runs = {f"{stage} student": recipes[stage]["output_dir"] for stage in ("quality", "diversity")}
    training_curves(runs, output / "training-curves", smooth=10)
    caption = "Training: divergence from the guided teacher, and the diversity reward."
    settings = recipes["evaluate"]
    prompts = _spread_prompts(output, settings["prompts"], settings["num_prompts"])
    return evaluate(
        SweepConfig.from_dict({**settings, "prompts": str(prompts)}),
        title="Guidance inside the weights, part of the variety back",
        introduction=(
            f"A small MusicGen, its classifier-free guidance (γ = {recipes['quality']['guidance_scale']:g}) distilled "
            "into a quality student, a diversity student that was also rewarded for clips that differ (β = "
            f"{recipes['diversity']['diversity_coef']:g}), and merges of the two. Students and merges need no "
            "guidance: half the decoder rows per clip. Listen to the clips of one prompt: each should be what the "
            "prompt says, and they should differ in what it leaves open."
        ),
        columns=_SHOWN,
        pictures=[Picture("training-curves.svg", caption)],
    )


def _spread_prompts(output: Path, source: str, count: int) -> Path:
    """Prompts of the test split, evenly spread over it, in a file of their own."""
    from diverse_cfg.prompts import load_prompts

    prompts = list(
        dict.fromkeys(load_prompts(prompt_source(source), split="test", default_split="test")["prompt"])
    )
    if len(prompts) < count:
        raise ValueError(f"{source} has {len(prompts)} test prompts, the demo wants {count}")
    chosen = [prompts[index * len(prompts) // count] for index in range(count)]
    return write_text(output / "held-out-prompts.txt", "\n".join(chosen) + "\n")


def _write_cards(results: "Results", output: Path, merges: list[Path]) -> None:
    """The numbers beside the weights of each student and merge, and on its card."""
    from diverse_cfg.cards import write_card
    from diverse_cfg.publishing import add_results

    models = {f"{stage} student": output / stage for stage in ("quality", "diversity")}
    models |= {f"merge λ={folder.name.removeprefix('weight-')}": folder for folder in merges}
    for name, folder in models.items():
        if results[name].ok:
            add_results(folder, results, name, _SHOWN)
            write_card(folder)


COMMAND = Command(
    name="demo",
    summary="run the whole method on the shipped base: train, merge, evaluate, listen",
    add_arguments=add_demo_arguments,
    run=run_demo,
    resume="what is complete is kept; run the same command again to go on",
)
