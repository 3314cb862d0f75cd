"""Recordings to train an embedder on: audio files or codes, of which pairs of disjoint chunks are drawn.

A recording may know its prompt. Clips of one prompt form a group: an embedder that is told them apart learns
what a prompt leaves open, and prompts are kept whole where some recordings are held out.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from diverse_cfg.embeddings.audio import resample, to_mono
from diverse_cfg.untrusted import inside

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# Chunks longer than this tell no more about what a recording sounds like, and cost more.
LONGEST_DEFAULT_CHUNK = 5.0
SHORTEST_CHUNK = 0.25
# What `diverse-cfg generate` writes beside its clips.
_MANIFEST = "generations.json"


class Recordings(ABC):
    """What `train_embedder` needs.

    Attributes:
        prompts: one per recording, None where it is not known.
        reads: "waveforms" or "codes".
        sampling_rate: Hz of the chunks, or of the codec.
    """

    prompts: list[str | None]
    reads: str
    sampling_rate: int

    def __len__(self) -> int:
        return len(self.prompts)

    def pairs(self, chosen: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two disjoint chunks of every chosen recording, at random places, in random order: two stacks [B, …]."""
        first, second = zip(*(self._pair(index, generator) for index in chosen), strict=True)
        return torch.stack(first), torch.stack(second)

    @abstractmethod
    def _pair(self, index: int, generator: torch.Generator) -> list[Tensor]: ...


class AudioRecordings(Recordings):
    """Audio files, of which only the chunks that are drawn are read.

    Args:
        files: paths; all are looked at now.
        sampling_rate: Hz that chunks are brought to; by default the rate of most files.
        chunk_seconds: length of a chunk; by default half of the shortest file, at most 5 s.
        prompts: one per file, or None.

    Raises:
        ValueError: no files, a file that is no audio, or one without room for two chunks.
    """

    reads = "waveforms"

    def __init__(
        self,
        files: Sequence[Path],
        sampling_rate: int | None = None,
        chunk_seconds: float | None = None,
        prompts: Sequence[str | None] | None = None,
    ):
        if not files:
            raise ValueError("there are no audio files to train on")
        self.files = list(files)
        self.prompts = list(prompts or [None] * len(self.files))
        infos = [_info(path) for path in self.files]
        self.rates, self.lengths = [info.samplerate for info in infos], [info.frames for info in infos]
        self.sampling_rate = sampling_rate or Counter(self.rates).most_common(1)[0][0]
        seconds = [info.frames / info.samplerate for info in infos]
        self.chunk_seconds = _chunk_length(seconds, chunk_seconds, [str(path) for path in self.files])

    @classmethod
    def from_folder(
        cls, folder: str | Path, sampling_rate: int | None = None, chunk_seconds: float | None = None
    ) -> "AudioRecordings":
        """All audio files below a folder; prompts are known where `diverse-cfg generate` wrote it.

        Raises:
            ValueError: see the class; or a folder of `generate` that is not finished.
            FileNotFoundError: no such folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        manifest = folder / _MANIFEST
        if manifest.is_file():
            clips = json.loads(manifest.read_text(encoding="utf-8"))["clips"]
            missing = [clip["file"] for clip in clips if not inside(folder, clip["file"]).is_file()]
            if missing:
                raise ValueError(
                    f"{folder} lacks {len(missing)} of its {len(clips)} clips, such as {missing[0]}: finish it "
                    "with diverse-cfg generate --resume"
                )
            files = [folder / clip["file"] for clip in clips]
            return cls(files, sampling_rate, chunk_seconds, [clip["prompt"] for clip in clips])
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        if not files:
            raise ValueError(f"{folder} holds no audio: looked for {', '.join(AUDIO_SUFFIXES)} at any depth")
        return cls(files, sampling_rate, chunk_seconds)

    def _pair(self, index: int, generator: torch.Generator) -> list[Tensor]:
        size = int(self.chunk_seconds * self.rates[index])
        starts = _disjoint_starts(self.lengths[index], size, generator)
        return [self._chunk(index, start, size) for start in starts]

    def _chunk(self, index: int, start: int, size: int) -> Tensor:
        try:
            samples, rate = soundfile.read(
                self.files[index], size, start, dtype="float32", always_2d=True, fill_value=0.0
            )
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{self.files[index]} cannot be read: {error}") from error
        audio = resample(to_mono(torch.from_numpy(samples.T)[None]), rate, self.sampling_rate)[0]
        wanted = int(self.chunk_seconds * self.sampling_rate)
        return torch.nn.functional.pad(audio[:wanted], (0, max(0, wanted - len(audio))))


class CodeRecordings(Recordings):
    """Codes of clips, all by one codec.

    Args:
        clips: codes [K, T] of each.
        sampling_rate: Hz of the codec's audio.
        frame_rate: frames per second.
        codebook_size: codes of a codebook.
        chunk_seconds: length of a chunk; by default half of the shortest clip, at most 5 s.
        prompts: one per clip, or None.

    Raises:
        ValueError: no clips, clips of different codebooks, codes beyond the codebook, or no room for two
            chunks.
    """

    reads = "codes"

    def __init__(
        self,
        clips: Sequence[Tensor],
        *,
        sampling_rate: int,
        frame_rate: float,
        codebook_size: int,
        chunk_seconds: float | None = None,
        prompts: Sequence[str | None] | None = None,
    ):
        if not clips:
            raise ValueError("there are no codes to train on")
        self.clips = list(clips)
        self.prompts = list(prompts or [None] * len(self.clips))
        self.sampling_rate, self.frame_rate, self.codebook_size = sampling_rate, frame_rate, codebook_size
        books = {len(clip) for clip in self.clips}
        if len(books) > 1:
            raise ValueError(f"the clips have different numbers of codebooks: {sorted(books)}")
        self.num_codebooks = books.pop()
        low, high = min(int(c.min()) for c in self.clips), max(int(c.max()) for c in self.clips)
        if low < 0 or high >= codebook_size:
            raise ValueError(
                f"codes from {low} to {high} are not of a codec with {codebook_size} codes: name the model "
                "that played them"
            )
        seconds = [clip.shape[1] / frame_rate for clip in self.clips]
        names = [f"clip {index}" for index in range(len(self.clips))]
        self.chunk_seconds = _chunk_length(seconds, chunk_seconds, names)
        self.chunk_frames = max(1, int(self.chunk_seconds * frame_rate + 1e-6))

    def _pair(self, index: int, generator: torch.Generator) -> list[Tensor]:
        clip, size = self.clips[index], self.chunk_frames
        starts = _disjoint_starts(clip.shape[1], size, generator)
        return [clip[:, start : start + size].long() for start in starts]


def _chunk_length(seconds: Sequence[float], wanted: float | None, names: Sequence[str]) -> float:
    """Length of a chunk, of which every recording must hold two.

    Raises:
        ValueError: naming the recordings that are too short, and the remedy.
    """
    shortest = int(np.argmin(seconds))
    if wanted is None:
        wanted = min(seconds[shortest] / 2, LONGEST_DEFAULT_CHUNK)
        if wanted < SHORTEST_CHUNK:
            raise ValueError(
                f"{names[shortest]} lasts {seconds[shortest]:.2f} s: too short for two chunks of at least "
                f"{SHORTEST_CHUNK} s; remove such recordings"
            )
        return wanted
    if not wanted > 0:
        raise ValueError(f"chunk_seconds={wanted} must be positive")
    short = [index for index, length in enumerate(seconds) if length + 1e-6 < 2 * wanted]
    if short:
        raise ValueError(
            f"{len(short)} of {len(seconds)} recordings have no room for two chunks of {wanted:g} s, such as "
            f"{names[short[0]]} ({seconds[short[0]]:.2f} s): remove them, or ask for chunks of at most "
            f"{seconds[shortest] / 2:.2f} s"
        )
    return wanted


def _disjoint_starts(length: int, size: int, generator: torch.Generator) -> list[int]:
    """Where two chunks that do not overlap begin, every placement equally likely, in random order."""
    # Two places among slack + 1, equal ones allowed, are two different ones among slack + 2.
    places = length - 2 * size + 2
    first = int(torch.randint(places, (), generator=generator))
    second = (first + 1 + int(torch.randint(places - 1, (), generator=generator))) % places
    return [first, second - 1 + size] if first < second else [first - 1 + size, second]


def _info(path: Path):
    try:
        return soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is no audio that can be read ({error}): remove or convert it") from error
