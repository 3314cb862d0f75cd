"""The audible attributes of the nano world: their classes, their names in prompts, and what makes a clip one of them.

The recipe that renders and captions the training clips, the judges and the rule-based checks all read this file.
"""

import re

import numpy as np

INSTRUMENTS = ("piano", "harpsichord", "marimba", "organ", "guitar", "violin", "trumpet", "flute")
TEMPI = {
    "slow": (1, 5),
    "medium": (7, 10),
    "fast": (13, 30),
}  # note onsets in three seconds, both ends included
REGISTERS = {"low": (48, 57), "middle": (60, 69), "high": (72, 81)}  # median MIDI pitch
# Tonics a whole tone apart: no two of the twelve keys share their notes, so that all can be told apart by ear.
TONICS = {"C": 0, "D": 2, "E": 4, "F sharp": 6, "A flat": 8, "B flat": 10}
KEYS = {f"{name} {mode}": (pc, mode) for name, pc in TONICS.items() for mode in ("major", "minor")}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "instrument": INSTRUMENTS,
    "tempo": tuple(TEMPI),
    "register": tuple(REGISTERS),
    "key": tuple(KEYS),
}

# Krumhansl & Kessler (1982) key profiles.
_MAJOR = np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88])
_MINOR = np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17])


def key_correlations(weights: np.ndarray) -> np.ndarray:
    """Krumhansl–Schmuckler: Pearson correlation of pitch-class weights [..., 12] with 24 keys (12 major, 12 minor)."""
    profiles = np.stack([np.roll(p, k) for p in (_MAJOR, _MINOR) for k in range(12)])
    profiles = profiles - profiles.mean(1, keepdims=True)
    centred = weights - weights.mean(-1, keepdims=True)
    norm = np.linalg.norm(profiles, axis=1) * np.linalg.norm(centred, axis=-1, keepdims=True)
    return centred @ profiles.T / np.maximum(norm, 1e-12)


def key_scores(weights: np.ndarray) -> np.ndarray:
    """`key_correlations` of the twelve keys of `KEYS`, in their order [..., 12]."""
    return key_correlations(weights)[..., [pc + 12 * (mode == "minor") for pc, mode in KEYS.values()]]


def parse_prompt(prompt: str) -> dict[str, str]:
    """The attributes that `prompt` names, as `{attribute: class}`; empty for a prompt of another world."""
    found = {}
    for attribute, classes in ATTRIBUTES.items():
        for name in classes:
            if re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", prompt, flags=re.IGNORECASE):
                found[attribute] = name
                break
    return found


def level_of(prompt: str) -> int:
    """How many attributes `prompt` names: 1 to 4, or 0 for a prompt of another world."""
    return len(parse_prompt(prompt))
