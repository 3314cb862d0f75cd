"""The paper's experiment on the nano base: every arm × seed, then the sweeps, then the recorded numbers.

    python recipes/nano/experiment.py                    # everything that is missing; Ctrl-C and again: it goes on
    python recipes/nano/experiment.py --jobs 1 --only beta-20
    python recipes/nano/experiment.py --config recipes/nano/open.yaml --seeds 1 --only quality beta-0 sweep:validation

Every training is its own process, every sweep a few that fill its cache side by side and one that reads it. A task is
done when it was finished with the settings that the file has now. When all are, what the results page needs is copied
to `--recorded`: a part of an experiment never replaces a whole one.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from claims import REGISTERED, Claim, register
from tqdm import tqdm

from diverse_cfg.atomic import replacing, write_text
from diverse_cfg.evaluation.levels import LEVELS_FILE
from diverse_cfg.evaluation.systems import System
from diverse_cfg.settings import field_types, read_settings, require_type

HERE = Path(__file__).parent
CONFIG = HERE / "experiment.yaml"
RECORDED = HERE / "results" / "experiment"
DONE, STARTED = "done.json", "started.json"
HALFWAY = "halfway"
# A thread per process; and glibc keeps large blocks that are freed, which the kernel would clear again for every batch.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
LOGGED = (
    "kl/clip", "kl/codebook_0", "kl/codebook_1", "kl/codebook_2", "kl/codebook_3", "entropy/codebook_0",
    "reward/diversity", "reward/diversity_variance", "grad_norm", "grad_norm/distillation",
    "grad_norm/policy_gradient", "grad_norm/cosine", "prefix_baseline/explained_variance_10",
    "prefix_baseline/explained_variance_30", "prefix_baseline/explained_variance_60",
    "eval_kl/clip", "eval_reward/diversity", "eval_reward/monitor_diversity", "eval_rewards/adherence/mean",
    "step_time",
)  # fmt: skip


@dataclass
class Arm:
    """One way of training; see `experiment.yaml`."""

    recipe: str
    start: str
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] | None = None
    judged: bool = False  # the attribute judge listens during training: as an alarm, or as a guard


@dataclass
class Experiment:
    output: str
    seeds: list[int]
    arms: dict[str, Arm]
    sweeps: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    snapshots: list[int] = field(default_factory=list)
    halfway: dict[str, str] = field(default_factory=dict)  # the arms of `halfway.py`; empty leaves it out
    far_end: dict[str, str] = field(default_factory=dict)  # the findings' arms with another diversity student
    claims: list[Any] = field(
        default_factory=list
    )  # `claims.Claim`s about the sweep `test`, made before it is played

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Read the YAML file; names that do not exist are errors."""
        values = read_settings(path)
        _known(values, cls, str(path))
        for name, arm in values["arms"].items():
            _known(arm, Arm, f"{path}, arm {name}")
        arms = {name: Arm(**arm) for name, arm in values["arms"].items()}
        claims = [Claim.from_dict(entry, str(path)) for entry in values.get("claims", [])]
        experiment = cls(**values | {"arms": arms, "claims": claims})
        for name, arm in experiment.arms.items():
            if arm.start != "nano" and arm.start not in experiment.arms:
                raise ValueError(f"{path}, arm {name}: start={arm.start!r} is neither nano nor an arm")
        experiment.check_seeds(str(path))
        for arm in experiment.halfway.values():
            if arm not in experiment.arms or "test" not in experiment.sweeps:
                raise ValueError(f"{path}, halfway: needs a sweep named test, and {arm!r} among the arms")
        return experiment

    def check_seeds(self, where: str) -> None:
        """Raise a ValueError for a student that would start from one that is not trained."""
        for name, arm in self.arms.items():
            if arm.start != "nano" and (lacks := set(self.seeds_of(name)) - set(self.seeds_of(arm.start))):
                raise ValueError(
                    f"{where}, arm {name}: its start {arm.start} is not trained with seed {min(lacks)}"
                )

    def take_seeds(self, seeds: list[int]) -> None:
        """Train with these seeds alone: of an arm that has its own with those among them, or else with the first."""
        self.seeds = seeds
        for arm in self.arms.values():
            if arm.seeds is not None:
                arm.seeds = [seed for seed in arm.seeds if seed in seeds] or seeds[:1]

    def folder(self, arm: str, seed: int) -> Path:
        return Path(self.output) / arm / f"seed-{seed}"

    def seeds_of(self, arm: str) -> list[int]:
        return self.arms[arm].seeds or self.seeds

    def runs(self) -> list[tuple[str, int]]:
        """Every (arm, seed): seed by seed, then the arms that have seeds of their own."""
        seeds = sorted({seed for arm in self.arms for seed in self.seeds_of(arm)})
        every = [(arm, seed) for seed in seeds for arm in self.arms if seed in self.seeds_of(arm)]
        return sorted(every, key=lambda run: self.arms[run[0]].seeds is not None)

    def settings_of(self, arm_name: str, seed: int) -> dict[str, Any]:
        """The settings of one training: recipe, then those of all arms, then the arm's."""
        from diverse_cfg.assets import NANO_PARTS, nano_path

        arm = self.arms[arm_name]
        settings = self._merged(arm)
        start = "nano" if arm.start == "nano" else str(self.folder(arm.start, seed))
        settings |= {"model_name_or_path": start, "teacher_model": "nano", "seed": seed}
        settings["output_dir"] = str(self.folder(arm_name, seed))
        for key, part in (("diversity_embedder", "reward-encoder"), ("monitor_embedder", "eval-encoder")):
            name = settings.get(key, part)
            if name in NANO_PARTS:
                settings[key] = str(nano_path(name))
        return settings

    def _merged(self, arm: Arm) -> dict[str, Any]:
        settings = read_settings(HERE / arm.recipe) | self.settings | arm.settings
        if settings.get("guards", ...) is None:
            del settings["guards"]  # as if the recipe had none: its trainings are the same
        return settings

    def training_hash(self, arm_name: str, seed: int) -> str:
        """Of everything that decides what a training learns, its start included; folders are not in it."""
        arm = self.arms[arm_name]
        start = "nano" if arm.start == "nano" else self.training_hash(arm.start, seed)
        return _hash([self._merged(arm), arm.judged, start, seed])

    def sweep_hash(self, name: str) -> str:
        """Of everything that decides what a sweep measures."""
        students = {f"{arm}/{seed}": self.training_hash(arm, seed) for arm, seed in self.students(name)}
        return _hash([self.sweeps[name], students, self.snapshots])

    def students(self, name: str) -> list[tuple[str, int]]:
        """The (arm, seed) that a sweep plays."""
        text = json.dumps(self.sweeps[name]["systems"])
        return [(arm, seed) for arm, seed in self.runs() if f'"{arm}"' in text]

    @property
    def sweeps_folder(self) -> Path:
        return Path(self.output) / "sweeps"

    def sweep(self, name: str) -> dict[str, Any]:
        """A sweep's settings with the arms' names replaced by their students' folders."""
        settings = dict(self.sweeps[name])
        settings["output"] = str(self.sweeps_folder / name)
        settings["systems"] = [
            entry for system in settings["systems"] for entry in self._entries(dict(system))
        ]
        return settings

    def register_claims(self, name: str) -> None:
        """Before the first clip of the sweep `test`: keep what is claimed of it."""
        if name == "test":
            register(self.claims, self.sweeps_folder / name)

    def _entries(self, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """An entry, and with `snapshots` one more for every step that was kept of its first seed."""
        snapshots, arm = entry.pop("snapshots", False), entry.get("model")
        for key in ("model", "checkpoints"):
            if key in entry:
                value = entry[key]
                entry[key] = (
                    [self._students(v) for v in value] if isinstance(value, list) else self._students(value)
                )
        if not snapshots:
            yield entry
            return
        folder = self.folder(arm, self.seeds_of(arm)[0])
        for step in self.snapshots:
            if (folder / "snapshots" / str(step)).is_dir():
                student = str(folder / "snapshots" / str(step))
                yield {
                    **entry,
                    "name": f"{entry['name']} @{step}",
                    "model": student,
                    "series": entry["name"],
                    "step": step,
                }
        done, planned = folder / DONE, self._merged(self.arms[arm]).get("max_steps")
        steps = json.loads(done.read_text(encoding="utf-8"))["steps"] if done.is_file() else planned
        yield {
            **entry,
            "name": f"{entry['name']} @{steps}",
            "model": str(folder),
            "series": entry["name"],
            "step": steps,
        }

    def _students(self, name: str) -> str | list[str]:
        if name not in self.arms:
            return name
        folders = [str(self.folder(name, seed)) for seed in self.seeds_of(name)]
        return folders[0] if len(folders) == 1 else folders


def _hash(settings: Any) -> str:
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(path: Path, wanted: str) -> bool | None:
    """Whether a task is done: None where it was done with other settings.

    What was done before settings were noted counts as done, and is named.
    """
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8")).get("settings")
    if found is None:
        tqdm.write(f"{path.parent}: done, with settings that were not noted")
    return True if found in (None, wanted) else None


def _known(values: dict[str, Any], kind: type, where: str) -> None:
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missed := [name for name in required if name not in values]:
        raise ValueError(f"{where}: {', '.join(missed)} is missing")
    for name, annotation in field_types(kind).items():
        if name in values:
            require_type(f"{where}: {name}", values[name], annotation)


# ---- one process -----------------------------------------------------------------------------------------------------


def train(experiment: Experiment, arm: str, seed: int) -> None:
    """Train one student, or go on with it; `done.json` says that it is whole."""
    import torch
    from transformers import TrainerCallback
    from trl import TrlParser

    from diverse_cfg.callbacks import RewardHackingAlarm
    from diverse_cfg.cli.command import model_source, prompt_source
    from diverse_cfg.cli.quiet import quiet_libraries
    from diverse_cfg.cli.train import TrainArguments
    from diverse_cfg.config import CFGDiversityConfig
    from diverse_cfg.facets import FacetReward
    from diverse_cfg.prompts import load_prompts
    from diverse_cfg.reading import last_checkpoint
    from diverse_cfg.rewards import DiversityReward
    from diverse_cfg.trainer import CFGDiversityTrainer

    quiet_libraries()
    claim(experiment, arm, seed)
    settings = experiment.settings_of(arm, seed)
    settings["teacher_model"] = model_source(settings["teacher_model"])
    judged = experiment.arms[arm].judged
    args, config = TrlParser((TrainArguments, CFGDiversityConfig)).parse_dict(settings)
    rewards: list[Any] = [DiversityReward(config.diversity_embedder, config.guards)]
    rewards += [
        FacetReward(name.removeprefix("diversity_"), config.guards) for name in args.reward_funcs or ()
    ]
    if judged:
        config.reward_weights = [1.0] * len(rewards) + [0.0]
        rewards.append(judge_reward())
    prompts = prompt_source(args.dataset_name)
    trainer = CFGDiversityTrainer(
        model_source(args.model_name_or_path),
        reward_funcs=rewards,
        args=config,
        train_dataset=load_prompts(prompts, split="train"),
        eval_dataset=load_prompts(prompts, split="validation").select(range(16)) if judged else None,
    )

    class Snapshots(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in experiment.snapshots and state.global_step < state.max_steps:
                trainer.save_model(str(Path(args.output_dir) / "snapshots" / str(state.global_step)))

    if seed == experiment.seeds_of(arm)[0]:
        trainer.add_callback(Snapshots())
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))
    trainer.save_model()
    trainer.save_state()
    alarms = [c for c in trainer.callback_handler.callbacks if isinstance(c, RewardHackingAlarm)]
    folder = Path(config.output_dir)
    done = {
        "arm": arm, "seed": seed, "steps": trainer.state.global_step, "settings": experiment.training_hash(arm, seed),
        "threads": torch.get_num_threads(), "alarms": [raised for c in alarms for raised in c.raised],
        "commit": _git("rev-parse", "--short", "HEAD"), "versions": {"torch": torch.__version__},
    }  # fmt: skip
    write_text(folder / DONE, json.dumps(done, indent=1) + "\n")
    for checkpoint in folder.glob("checkpoint-*"):  # from which it would have gone on
        shutil.rmtree(checkpoint)


def claim(experiment: Experiment, arm: str, seed: int) -> None:
    """Note with which settings a training begins, so that none goes on with others.

    Raises:
        ValueError: it was begun, or finished, with others.
    """
    folder, wanted = experiment.folder(arm, seed), experiment.training_hash(arm, seed)
    for name in (STARTED, DONE):
        if finished(folder / name, wanted) is None:
            raise ValueError(
                f"{folder} was trained with other settings than arm {arm} has now: move that folder and the students "
                "that start from it away, or take another --output"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STARTED, json.dumps({"settings": wanted}))


def judge_reward():
    """The attribute judge as a TRL reward function; its name is what logs and guards call it."""
    import numpy as np

    from diverse_cfg.assets import nano_path
    from diverse_cfg.nano.judge import AttributeJudge

    judge = AttributeJudge.from_pretrained(nano_path("judge"))

    def adherence(prompts, waveforms, sampling_rate, **_):
        return np.nan_to_num(judge.adherence(waveforms, sampling_rate, list(prompts))["mean"]).tolist()

    return adherence


def part_of_sweep(experiment: Experiment, name: str, part: int, parts: int) -> None:
    """Every `parts`-th system of a sweep, for the sweep's cache alone."""
    from diverse_cfg.cli.quiet import quiet_libraries
    from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep

    quiet_libraries()
    experiment.register_claims(name)
    protocol, systems = build_sweep(SweepConfig.from_dict(experiment.sweep(name)))
    if chosen := systems[part::parts]:
        protocol.run(chosen)


def sweep(experiment: Experiment, name: str) -> None:
    """One sweep; one in which a system failed is not done."""
    from diverse_cfg.cli.quiet import quiet_libraries
    from diverse_cfg.evaluation.protocol import SweepConfig
    from diverse_cfg.evaluation.report import evaluate

    quiet_libraries()
    experiment.register_claims(name)
    settings = experiment.sweep(name)
    results = evaluate(SweepConfig.from_dict(settings))
    failed = [row.system.name for row in results.systems if not row.ok]
    if failed:
        raise RuntimeError(f"sweep {name}: {', '.join(failed)} failed")
    finish_sweep(experiment.sweeps_folder / name, experiment.sweep_hash(name))


def halfway(experiment: Experiment) -> None:
    """`halfway.py`, on the prompts of the test sweep."""
    import halfway as recipe

    arms = experiment.halfway
    seeds = [str(seed) for seed in experiment.seeds_of(arms["diverse"])]
    options = ["--quality", arms["quality"], "--diverse", arms["diverse"], "--seeds", *seeds]
    recipe.main(["--output", experiment.output, "--recorded", str(experiment.sweeps_folder), *options])
    finish_sweep(experiment.sweeps_folder / HALFWAY, _hash([arms, experiment.sweep_hash("test")]))


def finish_sweep(folder: Path, settings: str) -> None:
    """Note by what code and where a sweep was measured, then that it is done."""
    where = {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }
    write_text(folder / "run.json", json.dumps(where) + "\n")
    write_text(folder / DONE, json.dumps(where | {"settings": settings}))


def processor() -> str:
    """What the machine calls its CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def record(experiment: Experiment, recorded: Path) -> None:
    """What the results page reads, from a whole experiment: logs and times of the runs, numbers of the sweeps."""
    recorded.mkdir(parents=True, exist_ok=True)
    rows, runs = [], []
    for arm, seed in experiment.runs():
        folder = experiment.folder(arm, seed)
        log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
        runs.append(done | {"seconds": round(seconds_of(log))})
        rows += [
            [arm, seed, entry["step"], *(f"{entry[name]:.5g}" if name in entry else "" for name in LOGGED)]
            for entry in log if any(name in entry for name in LOGGED)
        ]  # fmt: skip
    with replacing(recorded / "logs.csv") as temporary, temporary.open("w", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["arm", "seed", "step", *LOGGED], *rows])
    write_text(recorded / "runs.json", json.dumps(runs, indent=1) + "\n")
    for name in [*experiment.sweeps, *([HALFWAY] if experiment.halfway else [])]:
        (recorded / name).mkdir(exist_ok=True)
        for file in ("metrics.json", "metrics.csv", "cells.npz", "run.json", LEVELS_FILE, REGISTERED):
            source = experiment.sweeps_folder / name / file
            if not source.is_file():  # not every sweep has all of them
                continue
            if source.suffix == ".json":
                write_text(
                    recorded / name / file, without_folder(source.read_text("utf-8"), experiment.output)
                )
                continue
            with replacing(recorded / name / file) as temporary:
                shutil.copyfile(source, temporary)


def without_folder(text: str, folder: str) -> str:
    """JSON in which the students' folders begin with their arm: what is recorded names no place of this machine."""
    for name in (folder, str(Path(folder).resolve())):
        inside = json.dumps(name.rstrip(os.sep) + os.sep, ensure_ascii=False)[:-1]  # as a text in JSON begins
        text = text.replace(inside, '"')
    return text


def seconds_of(log: list[dict[str, Any]]) -> float:
    """Time of all training steps, those before an interruption too; loading and evaluation are not in it."""
    timed = [(entry["step"], entry["step_time"]) for entry in log if "step_time" in entry]
    before = [0, *(step for step, _ in timed)]
    return sum((step - last) * mean for last, (step, mean) in zip(before, timed, strict=False))


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=HERE)
    return found.stdout.strip()


# ---- all of them -----------------------------------------------------------------------------------------------------


def missing(experiment: Experiment, only: Collection[str] | None, parts: int) -> dict[str, list[str]]:
    """What is to be done: task → tasks that come first; with `only`, of these arms, sweeps and `halfway`.

    A task is `arm/seed`, `part:name:i/n`, `sweep:name` or `halfway`. A sweep with other settings is run again, which
    its cache makes cheap; a training is hours, and is not replaced.

    Raises:
        ValueError: a training was begun or finished with other settings.
    """
    tasks: dict[str, list[str]] = {}
    for arm, seed in experiment.runs():
        folder, wanted = experiment.folder(arm, seed), experiment.training_hash(arm, seed)
        done = finished(folder / DONE, wanted)
        if done is None or finished(folder / STARTED, wanted) is None:
            claim(experiment, arm, seed)  # which says what to do about it
        if done or (only and arm not in only):
            continue
        start = experiment.arms[arm].start
        tasks[f"{arm}/{seed}"] = [] if start == "nano" else [f"{start}/{seed}"]
    for name in experiment.sweeps:
        if (only and f"sweep:{name}" not in only) or finished(
            experiment.sweeps_folder / name / DONE, experiment.sweep_hash(name)
        ):
            continue
        students = [f"{arm}/{seed}" for arm, seed in experiment.students(name)]
        shares = [f"part:{name}:{part}/{parts}" for part in range(parts)]
        tasks |= dict.fromkeys(shares, students)
        tasks[f"sweep:{name}"] = students + shares
    if experiment.halfway and (not only or HALFWAY in only):
        path, wanted = (
            experiment.sweeps_folder / HALFWAY / DONE,
            _hash([experiment.halfway, experiment.sweep_hash("test")]),
        )
        if not finished(path, wanted):
            tasks[HALFWAY] = ["sweep:test"]
    return tasks


def check_plan(experiment: Experiment) -> None:
    """Every sweep and every training's settings, before the first hour is spent.

    Raises:
        ValueError: what would be refused when its turn comes.
    """
    from trl import TrlParser

    from diverse_cfg.cli.quiet import quiet_libraries
    from diverse_cfg.cli.train import TrainArguments
    from diverse_cfg.config import CFGDiversityConfig
    from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep, planned_systems

    quiet_libraries()

    with tempfile.TemporaryDirectory() as folder:  # where students stand that are not trained yet
        plan = replace(experiment, output=folder)
        for arm, seed in plan.runs():
            settings = plan.settings_of(arm, seed)
            TrlParser((TrainArguments, CFGDiversityConfig)).parse_dict(settings)
            plan.folder(arm, seed).mkdir(parents=True)
            for step in plan.snapshots if seed == plan.seeds_of(arm)[0] else ():
                if step < settings["max_steps"]:
                    (plan.folder(arm, seed) / "snapshots" / str(step)).mkdir(parents=True)
        for name in plan.sweeps:
            settings = plan.sweep(name)
            build_sweep(SweepConfig.from_dict(settings))
            if name == "test" and plan.far_end:
                settings["arms"] = settings["arms"] | plan.far_end
                planned_systems(SweepConfig.from_dict(settings))
            if name == "test":
                check_claims(plan.claims, planned_systems(SweepConfig.from_dict(settings)))


def check_claims(claims: Collection[Claim], systems: Collection[System]) -> None:
    """Raise a ValueError for a claim about what is not played."""
    names, series = {system.name for system in systems}, {system.series for system in systems}
    for claim in claims:
        absent = [name for name in claim.systems if name not in names]
        absent += [claim.line] if claim.line and claim.line not in series else []
        if absent:
            raise ValueError(
                f"the claim {claim.claim!r} is about {absent[0]!r}, which the sweep test does not play"
            )


def run_all(
    experiment: Experiment, config: Path, jobs: int, only: Collection[str] | None, recorded: Path
) -> list[str]:
    """Run what is missing, `jobs` processes at a time; record all once nothing is. Returns the tasks that failed."""
    # Twice as many parts as processes, since systems differ in cost; a single process needs none.
    tasks, failed = missing(experiment, only, 2 * jobs if jobs > 1 else 0), []
    waiting = {task: {first for first in before if first in tasks} for task, before in tasks.items()}
    logs = Path(experiment.output) / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def run(task: str) -> int:
        with (logs / f"{task.replace('/', '-').replace(':', '-')}.log").open("a") as log:
            command = [
                sys.executable,
                __file__,
                "--config",
                str(config),
                "--output",
                experiment.output,
                "--seeds",
                *map(str, experiment.seeds),
                "--task",
                task,
            ]
            environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)}
            return subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode

    running: dict[Future, str] = {}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(tasks), desc="experiment", unit="task") as bar:
        while waiting or running:
            ready = [task for task, before in waiting.items() if not before][: jobs - len(running)]
            for task in ready:
                del waiting[task]
                running[pool.submit(run, task)] = task
            if not running:
                break  # what is left waits for something that failed
            bar.set_postfix_str(", ".join(running.values()))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                if future.result() != 0:
                    failed.append(task)
                    tqdm.write(f"{task} failed: see {logs}")
                else:
                    for before in waiting.values():
                        before.discard(task)
                bar.update()
    if failed or waiting or (only and missing(experiment, None, 0)):
        tqdm.write(f"{recorded} is left as it is: not all of the experiment is done")
    else:
        record(experiment, recorded)
    return failed + sorted(waiting)


def recorded_folder(config: Path, output: str | None, recorded: Path | None, experiment: Experiment) -> Path:
    """Where the numbers go: into the repository only those of the experiments that it ships, with all their seeds."""
    whole = config.resolve().parent == HERE.resolve() and Experiment.load(config).seeds == experiment.seeds
    shipped = whole and output is None
    return recorded or (RECORDED.with_name(config.stem) if shipped else Path(experiment.output) / "recorded")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument(
        "--only", nargs="+", metavar="TASK", help="these arms, sweeps (as sweep:NAME), and halfway alone"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="train with these alone, instead of the file's")
    parser.add_argument("--output", help="overrides `output` of the file")
    parser.add_argument(
        "--recorded",
        type=Path,
        help="folder for the numbers of the page; results/NAME for a shipped file NAME.yaml, else OUTPUT/recorded",
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)  # one task in this process
    arguments = parser.parse_args(argv)
    experiment = Experiment.load(arguments.config)
    experiment.output = arguments.output or experiment.output
    if arguments.seeds:
        experiment.take_seeds(arguments.seeds)
    if arguments.task:
        match arguments.task.replace("/", ":").split(":"):
            case ["halfway"]:
                halfway(experiment)
            case ["sweep", name]:
                sweep(experiment, name)
            case ["part", name, part, parts]:
                part_of_sweep(experiment, name, int(part), int(parts))
            case [arm, seed]:
                train(experiment, arm, int(seed))
        return 0
    recorded = recorded_folder(arguments.config, arguments.output, arguments.recorded, experiment)
    try:
        check_plan(experiment)
        failed = run_all(experiment, arguments.config, arguments.jobs, arguments.only, recorded)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if failed:
        print(f"not done: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
