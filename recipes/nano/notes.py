"""Songs in, short monophonic excerpts out: the musical material of the nano world.

A song is its melody as `(onset, duration, pitch)` in quarter notes. It comes from the OpenScore Lieder note lists
(`lieder.jsonl.gz`, CC0) or from any folder of MIDI files. Nothing here makes sound: `render.py` does.
Whatever cannot be read is skipped by name and counted, never silently.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diverse_cfg.nano.attributes import key_correlations

logger = logging.getLogger(__name__)

SPLITS = {"train": 0.84, "validation": 0.08, "test": 0.08}


@dataclass(frozen=True)
class Song:
    """A melody: `notes` [n, 3] = onset, duration (quarters), MIDI pitch; sorted, one note at a time."""

    id: str
    notes: np.ndarray
    tonic: int  # 0 = C … 11 = B
    mode: str  # "major" or "minor"


def split_of(song_id: str) -> str:
    """Deterministic split of a song: a hash decides, so adding songs moves no other song."""
    draw = int.from_bytes(hashlib.sha256(song_id.encode()).digest()[:8], "big") / 2**64
    for split, share in SPLITS.items():
        draw -= share
        if draw < 0:
            return split
    return "test"


def pitch_class_weights(notes: np.ndarray) -> np.ndarray:
    """Duration-weighted pitch-class histogram [12] of `notes` [n, 3]."""
    return np.bincount(notes[:, 2].astype(int) % 12, weights=notes[:, 1], minlength=12)


def skyline(notes: np.ndarray) -> np.ndarray:
    """The melody of possibly chordal `notes`: the highest note of each onset, cut where the next one begins."""
    notes = notes[np.lexsort((-notes[:, 2], notes[:, 0]))]
    keep = np.concatenate([[True], np.diff(notes[:, 0]) > 1e-6])
    notes = notes[keep].copy()
    room = np.append(np.diff(notes[:, 0]), np.inf)
    notes[:, 1] = np.minimum(notes[:, 1], room)
    return notes


def read_lieder(path: Path) -> tuple[list[Song], dict[str, str]]:
    """Songs of a `lieder.jsonl(.gz)` file, and the reason for each song that was left out."""
    songs: list[Song] = []
    skipped: dict[str, str] = {}
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                name = record["id"]
                if record.get("polymeter"):
                    skipped[name] = "polymetric: its timing is not exact"
                elif record.get("duplicate_of"):
                    skipped[name] = f"same notes as {record['duplicate_of']}"
                else:
                    melody = next((p for p in record["parts"] if p["role"] == "melody"), None)
                    if melody is None or len(melody["notes"]) < 24:
                        skipped[name] = "no melody of at least 24 notes"
                        continue
                    key = record["key_by_signature"]
                    notes = skyline(np.asarray(melody["notes"], dtype=float))
                    songs.append(Song(name, notes, int(key["tonic"]), key["mode"]))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                skipped[f"line {number}"] = f"not a song record ({type(error).__name__}: {error})"
    return songs, skipped


def read_midi_folder(folder: Path) -> tuple[list[Song], dict[str, str]]:
    """Songs of every `*.mid`/`*.midi` below `folder`: the skyline of the track with the highest mean pitch."""
    import mido

    songs: list[Song] = []
    skipped: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".mid", ".midi"}):
        name = path.relative_to(folder).as_posix()
        try:
            notes = _midi_melody(mido.MidiFile(path))
        except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
            skipped[name] = f"not a readable MIDI file ({type(error).__name__}: {error})"
            continue
        if len(notes) < 24:
            skipped[name] = "no melody of at least 24 notes"
            continue
        best = int(np.argmax(key_correlations(pitch_class_weights(notes))))
        songs.append(Song(name, notes, best % 12, "major" if best < 12 else "minor"))
    return songs, skipped


def _midi_melody(midi) -> np.ndarray:
    candidates = []
    for track in midi.tracks:
        now, sounding, notes = 0, {}, []
        for message in track:
            now += message.time
            if message.type not in ("note_on", "note_off") or message.channel == 9:  # 9 = drums
                continue
            slot = (message.channel, message.note)
            if message.type == "note_on" and message.velocity > 0:
                sounding[slot] = now
            elif slot in sounding:
                start = sounding.pop(slot)
                notes.append((start / midi.ticks_per_beat, (now - start) / midi.ticks_per_beat, message.note))
        if len(notes) >= 24:
            candidates.append(np.asarray(notes, dtype=float))
    if not candidates:
        return np.zeros((0, 3))
    return skyline(max(candidates, key=lambda n: n[:, 2].mean()))


def read_songs(source: str | Path) -> list[Song]:
    """Read `source`, a lieder file or a folder of MIDI files; reports what was skipped.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: nothing in it could be used.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"no notes at {source}: give a lieder.jsonl(.gz) file or a folder of MIDI files"
        )
    songs, skipped = read_midi_folder(source) if source.is_dir() else read_lieder(source)
    for name, reason in skipped.items():
        logger.warning("skipped %s: %s", name, reason)
    logger.info("%d songs from %s, %d skipped", len(songs), source, len(skipped))
    if not songs:
        raise ValueError(f"no usable song in {source} ({len(skipped)} skipped, see the warnings)")
    return songs
