"""What a clip is, measured on its notes, and how to say it.

Only attributes that can be heard, and checked without any model, are named: instrument, tempo (notes per second),
register (median pitch) and key. Between the classes of tempo and register lie gaps; a clip that falls into one, or
whose key is not clear from its own notes, has no such attribute and its caption does not mention it.
"""

from __future__ import annotations

import numpy as np
from notes import pitch_class_weights

from diverse_cfg.nano.attributes import KEYS, REGISTERS, TEMPI, key_scores

CLIP_SECONDS = 3.0
KEY_MARGIN = 0.08  # by how much the best of the twelve correlations must exceed the next


def key_of(notes: np.ndarray) -> str | None:
    """The clear key of `notes` [n, 3] among `KEYS`, or None (Krumhansl–Schmuckler, best of twelve by a margin)."""
    if len(notes) < 4:
        return None
    scores = key_scores(pitch_class_weights(notes))
    order = np.argsort(scores)
    if scores[order[-1]] - scores[order[-2]] < KEY_MARGIN:
        return None
    return tuple(KEYS)[order[-1]]


def _class_of(value: float, classes: dict[str, tuple[int, int]]) -> str | None:
    return next((name for name, (low, high) in classes.items() if low <= value <= high), None)


def attributes_of(notes: np.ndarray, instrument: str, start: float) -> dict[str, str | None]:
    """Attributes of the clip `[start, start + 3 s)` of a recording whose `notes` [n, 3] are in seconds."""
    onset, end = notes[:, 0], notes[:, 0] + notes[:, 1]
    stop = start + CLIP_SECONDS
    begins = (onset >= start - 1e-3) & (onset < stop - 0.05)
    inside = notes[(end > start + 0.05) & (onset < stop - 0.05)].copy()
    inside[:, 1] = np.minimum(inside[:, 0] + inside[:, 1], stop) - np.maximum(inside[:, 0], start)
    return {
        "instrument": instrument,
        "tempo": _class_of(int(begins.sum()), TEMPI),
        "register": _class_of(float(np.median(inside[:, 2])), REGISTERS) if len(inside) else None,
        "key": key_of(inside),
    }


def caption(attributes: dict[str, str | None], rng: np.random.Generator | None = None) -> str:
    """A caption of what is known of a clip; with `rng` the wording varies and attributes are left out at random.

    The instrument is always named. Without `rng` the canonical wording of the evaluation prompts is used.
    """
    known = {k: v for k, v in attributes.items() if v is not None}
    if rng is not None:
        known = {k: v for k, v in known.items() if k == "instrument" or rng.random() > 0.15}
    instrument, key = known["instrument"], known.get("key")
    adjectives = " ".join(w for w in (known.get("tempo"), known.get("register")) if w)
    form = 0 if rng is None else int(rng.integers(4))
    article = "an" if instrument[0] in "aeiou" else "a"
    if form == 0:
        text = f"a {adjectives} melody" + (f" in {key}" if key else "") + f" on {article} {instrument}"
    elif form == 1:
        text = (
            f"{instrument} solo" + (f", {adjectives}" if adjectives else "") + (f", in {key}" if key else "")
        )
    elif form == 2:
        text = f"{article} {instrument} plays a {adjectives} tune" + (f" in {key}" if key else "")
    else:
        text = (f"{key}: " if key else "") + f"{adjectives} {instrument} melody"
    return " ".join(text.split())
