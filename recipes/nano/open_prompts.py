"""Prompts that leave something open: levels 1 to 4 are the number of attributes that a prompt names.

    python recipes/nano/open_prompts.py            # writes them anew, from the seed, into the package's assets

Level 1 names the instrument alone, since the base knows no caption without one; levels 2 and 3 name one and two more,
each choice of which equally often; level 4 names all. A meaning (what a prompt names) belongs to one split only. The
eight meanings of level 1 are too few for that: there the splits differ in their wordings. The wordings are four forms
× three nouns, four of which the base was trained on. Validation and test have the same number of prompts of each
level, in turn, so that their first prompts are such a set too; at level 4 theirs are the first of the prompts `nano`.
Training prompts are as many of each level; those of level 1 stand there several times.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from diverse_cfg.atomic import write_text
from diverse_cfg.nano.attributes import ATTRIBUTES

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "diverse_cfg" / "assets" / "nano" / "open-prompts"
NOUNS = ("melody", "solo", "tune")
PER_LEVEL = {"test": 32, "validation": 16, "train": 480}
SHARES = {"test": 1 / 3, "validation": 1 / 6}  # of the meanings; the rest is for training
Row = dict[str, object]


def split_combinations(seed: int) -> dict[str, list[dict[str, str]]]:
    """All combinations of attributes, split by hash: 96 to report on, 96 to choose on, the rest to train on."""
    combinations = [
        dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())
    ]
    combinations.sort(key=lambda c: hashlib.sha256(json.dumps([seed, c]).encode()).hexdigest())
    return {"test": combinations[:96], "validation": combinations[96:192], "train": combinations[192:]}


def wordings(attributes: dict[str, str]) -> list[str]:
    """Every way to say what `attributes` names, each once."""
    instrument, key = attributes["instrument"], attributes.get("key")
    adjectives = " ".join(attributes[name] for name in ("tempo", "register") if name in attributes)
    article = "an" if instrument[0] in "aeiou" else "a"
    in_key = f" in {key}" if key else ""
    texts = []
    for noun in NOUNS:
        texts += [
            f"a {adjectives} {noun}{in_key} on {article} {instrument}",
            f"{instrument} {noun}"
            + (f", {adjectives}" if adjectives else "")
            + (f", in {key}" if key else ""),
            f"{article} {instrument} plays a {adjectives} {noun}{in_key}",
            (f"{key}: " if key else "") + f"{adjectives} {instrument} {noun}",
        ]
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))


def open_prompts(seed: int) -> dict[str, list[Row]]:
    """Split → rows with `prompt`, `level` and the `attributes` that it names."""
    rng = np.random.default_rng([seed, 1])
    levels = [_level_1(rng), _level(2, rng), _level(3, rng), _level_4(seed, rng)]
    found = {}
    for split, count in PER_LEVEL.items():
        columns = [_exactly(level[split], count) for level in levels]
        found[split] = [row for turn in zip(*columns, strict=True) for row in turn]
    return found


def _row(attributes: dict[str, str], text: str) -> Row:
    return {"prompt": text, "level": len(attributes), "attributes": attributes}


def _level_1(rng: np.random.Generator) -> dict[str, list[Row]]:
    """The wordings of every instrument alone: 4 for test, 2 for validation, the other 3 for training."""
    splits: dict[str, list[Row]] = {split: [] for split in PER_LEVEL}
    for instrument in ATTRIBUTES["instrument"]:
        attributes = {"instrument": instrument}
        texts = rng.permutation(wordings(attributes)).tolist()
        for split, part in (("test", texts[:4]), ("validation", texts[4:6]), ("train", texts[6:])):
            splits[split] += [_row(attributes, text) for text in part]
    return {split: _shuffled(rows, rng) for split, rows in splits.items()}


def _level(level: int, rng: np.random.Generator) -> dict[str, list[Row]]:
    """The instrument and `level` − 1 of the other attributes; each choice of which has as many prompts."""
    others = [name for name in ATTRIBUTES if name != "instrument"]
    choices = []
    for chosen in itertools.combinations(others, level - 1):
        names = ("instrument", *chosen)
        values = itertools.product(*(ATTRIBUTES[name] for name in names))
        meanings = _shuffled([dict(zip(names, of_one, strict=True)) for of_one in values], rng)
        choices.append(_split(meanings, rng))
    # In turn: the first of each choice, then the second, ...
    return {
        split: [row for turn in itertools.zip_longest(*(c[split] for c in choices)) for row in turn if row]
        for split in PER_LEVEL
    }


def _split(meanings: list[dict[str, str]], rng: np.random.Generator) -> dict[str, list[Row]]:
    """Meanings → splits; of every meaning its wordings, all meanings' first before any meaning's second."""
    test, validation = (round(share * len(meanings)) for share in SHARES.values())
    parts = {
        "test": meanings[:test],
        "validation": meanings[test : test + validation],
        "train": meanings[test + validation :],
    }
    rows = {}
    for split, part in parts.items():
        texts = [rng.permutation(wordings(attributes)).tolist() for attributes in part]
        most = -(-max(PER_LEVEL.values()) // len(part))  # enough wordings of each for any split
        rows[split] = [
            _row(attributes, of_one[turn % len(of_one)])
            for turn in range(most)
            for attributes, of_one in zip(part, texts, strict=True)
        ]
    return rows


def _level_4(seed: int, rng: np.random.Generator) -> dict[str, list[Row]]:
    """All attributes, split as the prompts `nano` are; validation and test in their canonical wording."""
    splits = split_combinations(seed)
    rows = {s: [_row(a, wordings(a)[0]) for a in splits[s]] for s in ("test", "validation")}
    train = _shuffled(splits["train"], rng)
    return rows | {"train": [_row(a, str(rng.choice(wordings(a)))) for a in train]}


def _shuffled(rows: list, rng: np.random.Generator) -> list:
    return [rows[i] for i in rng.permutation(len(rows))]


def _exactly(rows: list[Row], count: int) -> list[Row]:
    """The first `count` rows, from the start again where there are fewer."""
    return list(itertools.islice(itertools.cycle(rows), count))


def write_open_prompts(folder: Path, seed: int) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in open_prompts(seed).items():
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    write_open_prompts(arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
