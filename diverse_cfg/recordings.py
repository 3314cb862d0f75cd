"""A user's own recordings: found with their captions, checked, and turned into codes once.

`find_recordings` reads a folder, a table or a dataset; `encode_recordings` runs the codec and keeps the codes in a
cache whose key is the hash of the audio and of the codec; `Cuts` draws the clips that are trained on.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diverse_cfg.atomic import replacing
from diverse_cfg.embeddings.audio import resample
from diverse_cfg.embeddings.recordings import AUDIO_SUFFIXES
from diverse_cfg.policies.policy import Policy
from diverse_cfg.prompts import load_prompts, read_text, require_no_split
from diverse_cfg.reading import read_json

logger = logging.getLogger(__name__)

IGNORED = -100
"""Stands in labels where a clip has no code, as in transformers."""

_AUDIO_COLUMNS = ("audio", "path", "file", "file_name")
_CAPTION_KEYS = ("description", "caption", "prompt", "text")
_TABLES = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's audio folders
_VERSION = "1"  # of how audio becomes codes
_PIECE, _MARGIN = 20, 1  # seconds that are encoded at once, and that are read around them
_SILENT = 1e-6  # mean square, −60 dBFS
_CLIPPED = 1e-3  # share of samples at full scale from which a recording counts as clipped
_MOST_WINDOWS = 8  # of a recording, at an evaluation


@dataclass(frozen=True)
class Recording:
    """Audio with a caption.

    Args:
        name: what messages call it.
        caption: its text.
        audio: path, or content of the file.
    """

    name: str
    caption: str
    audio: Path | bytes

    def open(self) -> BinaryIO:
        """Its bytes; raises `FileNotFoundError` where it is not there."""
        if isinstance(self.audio, bytes):
            return io.BytesIO(self.audio)
        if not self.audio.is_file():
            raise FileNotFoundError(f"there is no recording {self.name}: correct the path, or leave it out")
        return self.audio.open("rb")


@dataclass(frozen=True)
class CodedRecording:
    """A recording as codes.

    Args:
        name: what messages call it.
        caption: its text.
        digest: hash of its audio.
        codes: [K, F], silence at both ends left out.
        facts: of the audio, by name; see `_encode`.
    """

    name: str
    caption: str
    digest: str
    codes: Tensor
    facts: dict[str, Any]


# ---- finding them -----------------------------------------------------------------------------------------


def find_recordings(
    source: Any,
    *,
    split: str = "train",
    column: str | None = None,
    caption: str | None = None,
    default_split: str = "train",
) -> list[Recording]:
    """Recordings with their captions.

    Args:
        source: a folder of audio files, each with its caption beside it in a `.txt` or `.json` of the same name;
            or whatever `load_prompts` reads that has a column with audio ("audio", "path", "file" or
            "file_name"): a table of paths (also metadata.csv or .jsonl in a folder), an AudioCraft manifest, a
            dataset of the Hub.
        split: of a dataset with several.
        column: of the captions, or their key in the JSON files. Default: prompt, and description in JSON files.
        caption: of all files that have none beside them.
        default_split: the split that stands for none: a source without splits takes no other.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no audio, or a recording without a caption; the message names it.
    """
    where = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
    if where is not None and where.is_dir():
        table = next((where / name for name in _TABLES if (where / name).is_file()), None)
        files = sorted(path for path in where.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        if table is None and files:
            require_no_split(split, default_split, f"the folder {where}")
            return [Recording(str(path), _caption_beside(path, column, caption), path) for path in files]
        saved = any((where / name).is_file() for name in ("state.json", "dataset_dict.json"))
        if table is None and not saved:
            raise ValueError(f"{where} holds no audio: looked for {', '.join(AUDIO_SUFFIXES)} at any depth")
        source = table or where
    return _from_table(load_prompts(source, split=split, column=column, default_split=default_split), source)


def _caption_beside(path: Path, key: str | None, default: str | None) -> str:
    text, described = path.with_suffix(".txt"), path.with_suffix(".json")
    found: Any = default
    if text.is_file():
        found = read_text(text)
    elif described.is_file():
        values = read_json(described)
        found = next(
            (values[name] for name in ([key] if key else _CAPTION_KEYS) if values.get(name)), default
        )
    if not isinstance(found, str) or not found.strip():
        raise ValueError(
            f"{path} has no caption: write it into {text.name} beside it, or give all that have none the same "
            "with dataset_caption"
        )
    return " ".join(found.split())


def _from_table(table: Any, source: Any) -> list[Recording]:
    from datasets import Audio

    column = next((name for name in _AUDIO_COLUMNS if name in table.column_names), None)
    if column is None:
        raise ValueError(
            f"{source} has no column with audio ({', '.join(_AUDIO_COLUMNS)}), only "
            f"{', '.join(table.column_names)}: rename the column that holds the paths"
        )
    if isinstance(table.features[column], Audio):
        table = table.cast_column(column, Audio(decode=False))
    folder = Path(source).parent if isinstance(source, str | os.PathLike) else Path()
    found = []
    for number, (audio, caption) in enumerate(zip(table[column], table["prompt"], strict=True), 1):
        entry = audio if isinstance(audio, dict) else {"path": audio}
        path, content = entry.get("path"), entry.get("bytes")
        if content is None and not isinstance(path, str):
            raise ValueError(
                f"{source}, row {number}: {column}={audio!r} is neither a path nor an audio file"
            )
        name = f"{source}, row {number}" if path is None else str(path)
        if content is None:
            beside = folder / str(path)
            content = Path(str(path)) if Path(str(path)).is_file() else beside
        found.append(Recording(name, " ".join(caption.split()), content))
    return found


# ---- encoding them ----------------------------------------------------------------------------------------


def encode_recordings(
    recordings: Sequence[Recording],
    policy: Policy,
    cache: str | os.PathLike | None = None,
    quiet: bool = False,
) -> list[CodedRecording]:
    """Codes of recordings, from the cache where they are there already; silent recordings are left out.

    Args:
        recordings: what to encode.
        policy: whose codec does it.
        cache: folder; default: `codes` in DIVERSE_CFG_CACHE, or in ~/.cache/diverse-cfg.
        quiet: say nothing, as the other processes of a run.

    Raises:
        ValueError: no recordings, one that cannot be read, is empty or too short, or nothing but silence.
        FileNotFoundError: a file is not there.
    """
    if not recordings:
        raise ValueError("there are no recordings to train on")
    root = os.environ.get("DIVERSE_CFG_CACHE") or Path.home() / ".cache" / "diverse-cfg"
    folder = Path(cache or Path(root) / "codes") / _codec_digest(policy)
    folder.mkdir(parents=True, exist_ok=True)
    found, cached = [], 0
    for recording in tqdm(recordings, desc="encode", unit="recording", disable=quiet or None, leave=False):
        with recording.open() as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        path = folder / f"{digest}.safetensors"
        if path.is_file():
            cached += 1
        else:
            codes, facts = _encode(recording, policy)
            with replacing(path) as temporary:
                save_file({"codes": codes}, temporary, metadata={"facts": json.dumps(facts)})
        with safe_open(path, framework="pt") as file:
            codes, facts = file.get_tensor("codes"), json.loads(file.metadata()["facts"])
        found.append(CodedRecording(recording.name, recording.caption, digest, codes, facts))
    heard = [recording for recording in found if recording.codes.shape[1]]
    if not heard:
        raise ValueError(f"all {len(found)} recordings are silent, such as {found[0].name}")
    if not quiet:
        logger.info("%s", _summary(found, policy, cached))
    return heard


def _codec_digest(policy: Policy) -> str:
    """Hash of what decides which codes a waveform gets."""
    digest = hashlib.blake2b(digest_size=8)
    layout = (_VERSION, policy.delays, policy.vocab_size, policy.sampling_rate, policy.audio_channels)
    digest.update(repr(layout).encode())
    for name, tensor in policy.model.state_dict().items():
        if name.startswith(policy.family.codec_prefix or "\0"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encode(recording: Recording, policy: Policy) -> tuple[Tensor, dict[str, Any]]:
    """Codes [K, F] and facts: `rate` (Hz) and `channels` of the file, `seconds`, `clipped` (share of samples at full
    scale), `trimmed` (seconds of silence left out at both ends).

    Long audio is read and encoded in pieces that overlap, so that it takes the memory of one.
    """
    unit = Fraction(policy.frame_rate).limit_denominator(1000).denominator  # seconds that are whole frames
    margin, piece = _MARGIN * unit, -(-_PIECE // unit) * unit
    hop = policy.sampling_rate / policy.frame_rate
    kept, silent, length, clipped, number = [], [], 0, 0, 0
    with recording.open() as source, _sound(source, recording.name) as file:
        rate, channels = file.samplerate, file.channels
        blocks = file.blocks((piece + 2 * margin) * rate, 2 * margin * rate, dtype="float32", always_2d=True)
        block = next(blocks, None)
        while block is not None:
            following = next(blocks, None)
            if not np.isfinite(block).all():
                raise ValueError(f"{recording.name} holds samples that are no numbers: convert it again")
            clipped += int((np.abs(block) >= 0.999).any(axis=1).sum())
            length += len(block)
            audio = _in_channels(torch.from_numpy(block.T), policy.audio_channels)
            audio = resample(audio, rate, policy.sampling_rate)
            frames = int(audio.shape[1] / hop + 1e-6)  # whole ones
            first = round(margin * policy.frame_rate) if number else 0
            last = frames if following is None else round((margin + piece) * policy.frame_rate)
            waveforms = audio[None] if policy.audio_channels > 1 else audio
            if frames:
                kept.append(policy.encode(waveforms)[0, :, first:last].to(torch.int16).cpu())
                power = audio[:, : int(frames * hop)].square().unflatten(1, (frames, -1)).mean(2)
                silent.append((power < _SILENT).all(0)[first:last])
            block, number = following, number + 1
    if not kept:
        raise ValueError(
            f"{recording.name} is {'empty' if not length else 'shorter than a frame'}: remove or replace it"
        )
    codes, heard = torch.cat(kept, dim=1), (~torch.cat(silent)).nonzero()[:, 0]
    start, end = (int(heard[0]), int(heard[-1]) + 1) if len(heard) else (0, 0)
    facts = {
        "rate": rate,
        "channels": channels,
        "seconds": codes.shape[1] / policy.frame_rate,
        "clipped": clipped / length,
        "trimmed": (codes.shape[1] - (end - start)) / policy.frame_rate,
    }
    return codes[:, start:end].contiguous(), facts


@contextlib.contextmanager
def _sound(source: BinaryIO, name: str) -> Iterator[soundfile.SoundFile]:
    try:
        with soundfile.SoundFile(source) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} is no audio that can be read ({error}): remove or convert it") from error


def _in_channels(audio: Tensor, wanted: int) -> Tensor:
    """Audio [C, L] with the wanted number of channels: mixed to mono, or mono on both sides."""
    if len(audio) == wanted:
        return audio
    return audio.mean(0, keepdim=True).expand(wanted, -1)


def _summary(found: Sequence[CodedRecording], policy: Policy, cached: int) -> str:
    """What was found, in one line."""
    facts = [recording.facts for recording in found]
    rate, channels = policy.sampling_rate, policy.audio_channels
    silent = [recording.name for recording in found if not recording.codes.shape[1]]
    clipped = [recording for recording in found if recording.facts["clipped"] > _CLIPPED]
    trimmed = sum(fact["trimmed"] for fact in facts)
    counts = {
        f"resampled to {rate} Hz": sum(fact["rate"] != rate for fact in facts),
        "mixed to mono": sum(fact["channels"] > channels == 1 for fact in facts),
        "mono made stereo": sum(fact["channels"] != channels > 1 for fact in facts),
        f"clipped ({clipped[0].name if clipped else ''})": len(clipped),
        f"silent and left out ({silent[0] if silent else ''})": len(silent),
        "from the cache": cached,
    }
    said = [f"{count} {what}" for what, count in counts.items() if count]
    if trimmed >= 0.05:
        said.append(f"{trimmed:.1f} s of silence at the ends left out")
    minutes = sum(fact["seconds"] for fact in facts) / 60
    return f"recordings: {len(found)}, {minutes:.1f} min" + "".join(f"; {part}" for part in said)


# ---- clips out of them ------------------------------------------------------------------------------------


def split_recordings(
    recordings: Sequence[CodedRecording], held_out: float, seed: int
) -> tuple[list[CodedRecording], list[CodedRecording]]:
    """Whole recordings to train on, and to evaluate on; copies of one file stay together.

    Args:
        recordings: all of them.
        held_out: share of the second part, of which there is one recording at least; 0 holds out none.
        seed: of the choice, which depends neither on names nor on order.

    Raises:
        ValueError: a single recording, which cannot be in both.
    """
    digests = sorted({recording.digest for recording in recordings})
    if not held_out:
        return list(recordings), []
    if len(digests) < 2:
        raise ValueError(
            f"there is one recording, {recordings[0].name}, and held_out={held_out} wants another to evaluate on: add "
            "recordings, set held_out=0, or overfit it on purpose with quick"
        )
    count = min(max(1, round(held_out * len(digests))), len(digests) - 1)
    order = np.random.default_rng(seed).permutation(len(digests))
    chosen = {digests[index] for index in order[:count]}
    return (
        [recording for recording in recordings if recording.digest not in chosen],
        [recording for recording in recordings if recording.digest in chosen],
    )


class Cuts(Dataset):
    """Clips of T frames: at random places for training, at fixed ones for evaluation.

    A recording gives as many clips as fit into it, one at least; a shorter one is a clip with nothing behind its end.
    Item `i + n · len(self)` is the clip `i` of epoch n, and depends on that number and the seed alone.

    Args:
        recordings: what to cut.
        num_frames: T.
        seed: of places and dropped texts; None is for evaluation.
        text_dropout: share of the clips that are trained on without their text.
    """

    def __init__(
        self,
        recordings: Sequence[CodedRecording],
        num_frames: int,
        seed: int | None = None,
        text_dropout: float = 0.0,
    ):
        self.num_frames, self.seed, self.text_dropout = num_frames, seed, text_dropout
        self.clips: list[tuple[CodedRecording, int]] = []
        for recording in recordings:
            fitting = max(1, recording.codes.shape[1] // num_frames)
            if seed is None:  # evenly spread
                wanted = min(fitting, _MOST_WINDOWS)
                fitted = [index * fitting // wanted for index in range(wanted)]
            else:
                fitted = range(fitting)
            self.clips += [(recording, index * num_frames) for index in fitted]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`labels`: codes [K, T] with `IGNORED` behind the end; `caption`; `dropped`: whether it goes without it."""
        recording, start = self.clips[number % len(self)]
        dropped = False
        if self.seed is not None:
            draw = np.random.default_rng([self.seed, number])
            start = int(draw.integers(max(recording.codes.shape[1] - self.num_frames, 0) + 1))
            dropped = bool(draw.random() < self.text_dropout)
        part = recording.codes[:, start : start + self.num_frames].long()
        labels = torch.full((len(part), self.num_frames), IGNORED)
        labels[:, : part.shape[1]] = part
        return {"labels": labels, "caption": recording.caption, "dropped": dropped}


def collate(clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of `Cuts`: `labels` [N, K, T], `dropped` [N], `captions`."""
    return {
        "labels": torch.stack([clip["labels"] for clip in clips]),
        "dropped": torch.tensor([clip["dropped"] for clip in clips]),
        "captions": [clip["caption"] for clip in clips],
    }
