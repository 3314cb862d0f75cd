"""A listening test for webMUSHRA, the web server that studies with many listeners use
(github.com/audiolabs/webMUSHRA).

Of its page types the Likert scale with several stimuli fits: both sides of a trial are rated from 1 to 5,
as in the paper's study (arXiv 2410.06084), and the higher rating is the vote. A pair of clips is one
recording with a pause, since webMUSHRA has one file per stimulus. `import_ratings` turns its CSV into the
votes of the study, so that both kinds of test are counted alike.
"""

import csv
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

from diverse_cfg.atomic import new_folder, write_text
from diverse_cfg.listening.study import QUESTIONS, Trial, Vote, Votes, load_trials
from diverse_cfg.policies.files import write_wav
from diverse_cfg.untrusted import checked_name

SCALE = {
    "quality": ("bad", "poor", "fair", "good", "excellent"),
    "diversity": ("the same", "hardly different", "somewhat different", "different", "very different"),
}
_ASK = {
    "quality": "Rate each clip: its sound, how well it fits the text, its music.",
    "diversity": "Each recording holds two clips with a pause between. Rate how much the two clips differ.",
}
_SIDES = ("left", "right")
_PAUSE = 1.0  # seconds


def export_study(folder: str | os.PathLike, output: str | os.PathLike, test_id: str = "diverse_cfg") -> Path:
    """Write a configuration and its audio, to be copied over webMUSHRA's own `configs` folder.

    Args:
        folder: of the study, see `listening.make_study`.
        output: new folder.
        test_id: name of the configuration, and of the results folder.

    Returns:
        Path of the configuration; the test is then at `…/webMUSHRA/?config=<test_id>.yaml`.

    Raises:
        FileExistsError: the folder is there already.
        FileNotFoundError: no study.
        ValueError: a `test_id` that is no plain name.
    """
    checked_name(test_id, "the test id (--test-id)")
    trials = load_trials(folder)
    with new_folder(output) as incomplete:
        _write_test(trials, Path(folder), incomplete, test_id)
    return Path(output) / "configs" / f"{test_id}.yaml"


def _write_test(trials: Sequence[Trial], folder: Path, output: Path, test_id: str) -> None:
    audio = Path("configs") / "resources" / test_id
    (output / audio).mkdir(parents=True)
    pages: list[Any] = [
        {
            "type": "generic",
            "id": "welcome",
            "name": "Welcome",
            "content": "<p>Please use headphones. " + " ".join(map(escape, QUESTIONS.values())) + "</p>",
        },
        ["random", *(_page(trial, folder, output, audio) for trial in trials)],
        {
            "type": "finish",
            "name": "Thank you",
            "content": "Thank you for listening.",
            "showResults": False,
            "writeResults": True,
            "questionnaire": [{"type": "text", "label": "Name or pseudonym", "name": "name"}],
        },
    ]
    config = {
        "testname": "Which do you hear?",
        "testId": test_id,
        "bufferSize": 2048,
        "stopOnErrors": True,
        "showButtonPreviousPage": True,
        "remoteService": "service/write.php",
        "pages": pages,
    }
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    write_text(output / "configs" / f"{test_id}.yaml", text)


def import_ratings(folder: str | os.PathLike, path: str | os.PathLike) -> int:
    """Add the ratings of webMUSHRA's `lms.csv` to the votes of the study; votes that are there already are
    kept. The whole file is checked first: all of its votes are added, or none.

    Args:
        folder: of the study.
        path: `results/<test_id>/lms.csv`.

    Returns:
        How many votes are new.

    Raises:
        ValueError: not such a CSV, ratings of another study or off the scale, or a trial of which only one
            side was rated.
    """
    votes, found = Votes(folder), []
    for (listener, trial), ratings in _ratings(Path(path)).items():
        if trial not in votes.trials:
            raise ValueError(
                f"{path} rates trial {trial!r}, which is not in {folder}: is it of another study?"
            )
        if set(ratings) != set(_SIDES):
            raise ValueError(
                f"{path}: {listener} rated {' and '.join(ratings)} of trial {trial}, and not both sides"
            )
        difference = ratings["right"] - ratings["left"]
        answer = "same" if not difference else "right" if difference > 0 else "left"
        found.append(Vote(trial, listener, answer))
    return votes.add_new(found)


_COLUMNS = {"session_test_id", "trial_id", "stimuli_rating", "stimuli", "rating_time"}


def _ratings(path: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(listener, trial) → side → rating; the last rating counts, as a listener may go back."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := _COLUMNS - set(reader.fieldnames or ()):
                raise ValueError(
                    f"{path} lacks the columns {', '.join(sorted(missing))}: it is no lms.csv of webMUSHRA"
                )
            for line, row in enumerate(reader, start=2):
                if None in row:
                    raise ValueError(f"{path}, line {line} has more cells than the header: repair it")
                text = (row["stimuli_rating"] or "").strip()
                if text not in ("1", "2", "3", "4", "5"):
                    raise ValueError(f"{path}, line {line}: {text!r} is no rating from 1 to 5")
                listener = " / ".join(value for key, value in row.items() if key not in _COLUMNS and value)
                if not listener:
                    raise ValueError(f"{path}, line {line} names no listener: the questionnaire asks for one")
                found.setdefault((listener, row["trial_id"]), {})[row["stimuli"]] = int(text)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy lms.csv from webMUSHRA again") from error
    return found


def _page(trial: Trial, folder: Path, output: Path, audio: Path) -> dict[str, Any]:
    stimuli = {}
    for side, files in zip(_SIDES, (trial.left, trial.right), strict=True):
        target = audio / f"{trial.id}-{side}.wav"
        _joined([folder / file for file in files], output / target)
        stimuli[side] = target.as_posix()
    return {
        "type": "likert_multi_stimulus",
        "id": trial.id,
        "name": trial.kind.capitalize(),
        "content": f"<p>“{escape(trial.prompt)}”</p><p>{escape(_ASK[trial.kind])}</p>",
        "mustRate": True,
        "mustPlayback": "ended",
        "stimuli": stimuli,
        "response": [
            {
                "value": str(value),
                "label": label,
                "img": "configs/resources/images/star_off.png",
                "imgSelected": "configs/resources/images/star_on.png",
                "imgHigherResponseSelected": "configs/resources/images/star_on.png",
            }
            for value, label in enumerate(SCALE[trial.kind], start=1)
        ],
    }


def _joined(files: list[Path], target: Path) -> None:
    """The clips one after the other, with a pause between."""
    parts: list[np.ndarray] = []
    rate = 0
    for file in files:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        parts += [np.zeros((round(_PAUSE * rate), samples.shape[1]), dtype=np.float32)] if parts else []
        parts.append(samples)
    write_wav(target, torch.from_numpy(np.concatenate(parts).T), rate)
