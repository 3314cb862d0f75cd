"""Excerpts → audio: fluidsynth renders six-second recordings, each holding two three-second clips.

Both clips of a recording share song, instrument, tempo and key; the embedders use them as a positive pair, the
language model as two examples. Output of a split: `recordings.jsonl` and `audio.npy` (int16 [R, 99200], 16 kHz).
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from captions import CLIP_SECONDS, attributes_of, key_of
from notes import SPLITS, Song, split_of
from scipy.signal import resample_poly
from tqdm import tqdm

from diverse_cfg.nano.attributes import INSTRUMENTS, KEYS, REGISTERS, TEMPI

SAMPLE_RATE = 16_000
PROGRAMMES = dict(zip(INSTRUMENTS, (0, 6, 12, 19, 24, 40, 56, 73), strict=True))  # General MIDI
CLIP_STARTS = (0.0, 3.2)
RECORDING_SECONDS = 6.2
GAP_SECONDS = 0.8  # silence between recordings of one rendered file, so that releases do not leak
RENDER_RATE = 32_000  # rendered above the target rate and filtered down: no aliasing
SHARD = 200
TARGET_RMS, PEAK = 0.1, 0.97  # −20 dBFS


@dataclass(frozen=True)
class Recording:
    song: str
    instrument: str
    velocity: int
    notes: np.ndarray  # [n, 3] onset and duration in seconds, MIDI pitch


def require_fluidsynth(soundfont: str | Path) -> None:
    """Raise before any work when the synthesiser or its soundfont is missing."""
    if shutil.which("fluidsynth") is None:
        raise FileNotFoundError(
            "fluidsynth is not installed: `apt-get install fluidsynth fluid-soundfont-gm` (Debian/Ubuntu) or "
            "`brew install fluid-synth` (macOS). It is needed to rebuild the nano model, not to use it."
        )
    if not Path(soundfont).is_file():
        raise FileNotFoundError(f"no soundfont at {soundfont}: install fluid-soundfont-gm or set `soundfont`")


def draw_recording(songs: list[Song], rng: np.random.Generator) -> Recording:
    """Draw an excerpt: song, place, tempo and transposition such that its key and register are clear where possible."""
    instrument = INSTRUMENTS[rng.integers(len(INSTRUMENTS))]
    low, high = list(TEMPI.values())[rng.integers(len(TEMPI))]
    per_clip = rng.uniform(max(low, 3) - 0.4, min(high, 18) + 0.4)  # notes in three seconds
    for _ in range(30):
        song = songs[rng.integers(len(songs))]
        count = max(3, round(per_clip * RECORDING_SECONDS / CLIP_SECONDS))
        if len(song.notes) <= count + 1:
            continue
        first = int(rng.integers(len(song.notes) - count))
        part = song.notes[first : first + count + 1].copy()
        length = part[-1, 0] - part[0, 0]
        scale = RECORDING_SECONDS / length  # seconds per quarter: the recording holds `count` notes
        part = part[:-1]
        part[:, 0] = (part[:, 0] - part[0, 0]) * scale
        part[:, 1] *= scale
        gaps = np.append(part[1:, 0], RECORDING_SECONDS) - (part[:, 0] + part[:, 1])
        if not 0.1 <= scale <= 2.5 or gaps.max() > 0.9 or part[:, 2].std() < 0.5:
            continue  # a tempo nobody sings, a long rest, or a single repeated note
        shifted = _transpose(part, rng)
        if shifted is not None:
            return Recording(song.id, instrument, int(rng.integers(75, 112)), shifted)
    raise ValueError("no excerpt fits: the songs are too short or too sparse")


def _transpose(part: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Move `part` to one of the twelve keys (where its notes show it clearly) and into one of the registers."""
    target = list(KEYS)[rng.integers(len(KEYS))]
    shifts = [s for s in range(12) if key_of(_moved(part, s)) == target]
    if not shifts:
        return None
    low, high = list(REGISTERS.values())[rng.integers(len(REGISTERS))]
    moved = _moved(part, shifts[0])
    octaves = round(((low + high) / 2 - np.median(moved[:, 2])) / 12)
    moved = _moved(moved, 12 * octaves)
    return moved if moved[:, 2].min() >= 40 and moved[:, 2].max() <= 93 else None


def _moved(notes: np.ndarray, semitones: int) -> np.ndarray:
    moved = notes.copy()
    moved[:, 2] += semitones
    return moved


def _midi_bytes(recordings: list[Recording], path: Path) -> None:
    import mido

    ticks = 1000  # per second: 60 quarters per minute
    events = []
    for index, recording in enumerate(recordings):
        origin = index * (RECORDING_SECONDS + GAP_SECONDS)
        events.append((origin, 0, mido.Message("program_change", program=PROGRAMMES[recording.instrument])))
        for onset, duration, pitch in recording.notes:
            on, off = origin + onset, origin + min(onset + duration * 0.97, RECORDING_SECONDS)
            pitch = int(pitch)
            events.append((on, 2, mido.Message("note_on", note=pitch, velocity=recording.velocity)))
            events.append((max(off, on + 0.03), 1, mido.Message("note_off", note=pitch)))
        end = origin + RECORDING_SECONDS + 0.4
        events.append((end, 3, mido.Message("control_change", control=120, value=0)))  # all sound off
    events.sort(key=lambda e: (round(e[0] * ticks), e[1]))
    track, now = mido.MidiTrack(), 0
    track.append(mido.MetaMessage("set_tempo", tempo=1_000_000))
    for time, _, message in events:
        tick = round(time * ticks)
        track.append(message.copy(time=tick - now))
        now = tick
    midi = mido.MidiFile(ticks_per_beat=ticks)
    midi.tracks.append(track)
    midi.save(path)


def render_shard(job: tuple[list[Recording], str]) -> np.ndarray:
    """Render recordings with one fluidsynth run (dry: no reverb, no chorus) → int16 [R, L], −20 dBFS RMS each."""
    recordings, soundfont = job
    with tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder, "shard.mid"), Path(folder, "shard.wav")
        _midi_bytes(recordings, midi)
        command = ["fluidsynth", "-ni", "-q", "-R", "0", "-C", "0", "-g", "0.6", "-r", str(RENDER_RATE)]
        run = subprocess.run(
            [*command, "-F", str(wav), soundfont, str(midi)], capture_output=True, text=True, check=False
        )
        if run.returncode or not wav.is_file():
            raise RuntimeError(f"fluidsynth failed ({run.returncode}): {run.stderr.strip()[-300:]}")
        audio = soundfile.read(wav, dtype="float32", always_2d=True)[0].mean(1)
    length = round(RECORDING_SECONDS * SAMPLE_RATE)
    period = round((RECORDING_SECONDS + GAP_SECONDS) * RENDER_RATE)
    ratio = RENDER_RATE // SAMPLE_RATE
    out = np.zeros((len(recordings), length), dtype=np.int16)
    for index in range(len(recordings)):
        piece = audio[index * period : index * period + length * ratio]
        piece = resample_poly(np.pad(piece, (0, length * ratio - len(piece))), 1, ratio)
        piece = piece * TARGET_RMS / max(float(np.sqrt(np.mean(piece**2))), 1e-6)
        out[index] = np.round(piece * min(1.0, PEAK / max(np.abs(piece).max(), 1e-6)) * 32767)
    return out


def render_split(
    songs: list[Song], split: str, count: int, folder: Path, soundfont: str, seed: int, workers: int
) -> None:
    """Render `count` recordings of the songs of `split` into `folder/split`; done splits are left alone."""
    out = folder / split
    if (out / "recordings.jsonl").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    mine = [s for s in songs if split_of(s.id) == split]
    if not mine:
        raise ValueError(f"no song falls into the split {split!r}: {len(songs)} songs are too few")
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    recordings = [draw_recording(mine, rng) for _ in tqdm(range(count), desc=f"draw {split}", unit="rec")]
    shards = [recordings[i : i + SHARD] for i in range(0, count, SHARD)]
    length = round(RECORDING_SECONDS * SAMPLE_RATE)
    audio = np.lib.format.open_memmap(out / "audio.npy", mode="w+", dtype=np.int16, shape=(count, length))
    with multiprocessing.Pool(workers) as pool, tqdm(total=count, desc=f"render {split}", unit="rec") as bar:
        for index, rendered in enumerate(pool.imap(render_shard, [(s, soundfont) for s in shards])):
            audio[index * SHARD : index * SHARD + len(rendered)] = rendered
            bar.update(len(rendered))
    audio.flush()
    partial = out / "recordings.jsonl.partial"
    with partial.open("w") as file:
        for recording in recordings:
            clips = [attributes_of(recording.notes, recording.instrument, start) for start in CLIP_STARTS]
            row = {"song": recording.song, "velocity": recording.velocity, "clips": clips}
            file.write(json.dumps(row | {"notes": np.round(recording.notes, 4).tolist()}) + "\n")
    partial.rename(out / "recordings.jsonl")
