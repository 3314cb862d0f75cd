"""Takes: clips with everything that made them, as the page shows them and as they are kept in a folder."""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diverse_cfg.acoustics import TARGET_LUFS, loudness, piano_roll
from diverse_cfg.atomic import replacing
from diverse_cfg.plotting import png
from diverse_cfg.policies.files import write_wav
from diverse_cfg.policies.takes import ENDING, read_codes, save_codes
from diverse_cfg.reading import reading
from diverse_cfg.untrusted import slug

_PEAKS = 120  # bars of a waveform
_LONGEST_TEXT = 2000  # bytes of metadata that libsndfile's readers do not skip


@dataclass(frozen=True)
class Take:
    """One clip, and how to make it again.

    Args:
        id: of this take alone; part of its file's name.
        prompt: its text.
        model: what it is called on the page.
        seed: of the call that made it.
        number: which clip of that seed it is, from 0 (`sample_ids`).
        settings: γ, λ and the rest of the sampling; what it was made from, if from another take.
        sampling_rate: in Hz.
        codes: [K, T].
        embedding: where it is on the map [D].
        encoder: whose embedding that is.
        volume: at which it is played, so that no take seems better for being louder.
        looks: its thumbnail and its outline, for the page.
    """

    id: str
    prompt: str
    model: str
    seed: int
    number: int
    settings: dict[str, Any]
    sampling_rate: int
    seconds: float
    codes: list[list[int]]
    embedding: list[float]
    encoder: str
    volume: float
    looks: dict[str, Any]

    @property
    def file(self) -> str:
        """Name of its WAV file."""
        return f"{slug(self.prompt, 40)}-{self.seed}-{self.number + 1}-{self.id}.wav"

    def metadata(self) -> dict[str, str]:
        """What its WAV file says about it; a prompt that readers would not read is cut."""
        told = {"prompt": self.prompt, "model": self.model, "seed": self.seed, "take": self.number + 1}
        told |= self.settings
        comment = json.dumps(told, ensure_ascii=False)
        while len(comment.encode()) > _LONGEST_TEXT:
            told["prompt"] = f"{told['prompt'][: len(told['prompt']) * 3 // 4]}…"
            comment = json.dumps(told, ensure_ascii=False)
        return {"title": told["prompt"][:200], "comment": comment, "software": "diverse-cfg"}


def looks(waveform: Tensor, sampling_rate: int) -> dict[str, Any]:
    """The thumbnail of a waveform [L] or [2, L] as a data URI, and its outline in 0 … 100."""
    audio = waveform.float().cpu().numpy()
    picture = base64.b64encode(png((piano_roll(audio, sampling_rate, 128) * 20).round() / 20)).decode()
    parts = np.array_split(np.abs(np.atleast_2d(audio)).max(0), _PEAKS)
    peaks = [round(100 * min(1.0, float(part.max(initial=0)))) for part in parts]
    return {"image": f"data:image/png;base64,{picture}", "peaks": peaks}


def volume(waveform: Tensor, sampling_rate: int) -> float:
    """The factor that brings a clip down to the gallery's loudness; quiet ones stay as they are."""
    level = loudness(waveform.float().cpu().numpy(), sampling_rate)
    return round(min(1.0, 10 ** ((TARGET_LUFS - level) / 20)), 3)


def write_take(folder: str | os.PathLike, take: Take, waveform: Tensor) -> Path:
    """Write a take's WAV file with its settings in it."""
    path = Path(folder) / take.file
    write_wav(path, waveform, take.sampling_rate, texts=take.metadata())
    return path


def keep(folder: str | os.PathLike, take: Take, audio: Path, model: Any) -> Path:
    """Put a take's WAV file into a folder, and its codes beside it, so that it can be extended; the WAV comes last.

    Args:
        folder: that is there.
        take: which.
        audio: its WAV file.
        model: that has its codec.
    """
    path = Path(folder) / take.file
    facts = {name: value for name, value in take.__dict__.items() if name != "codes"}
    told = json.dumps(facts, ensure_ascii=False)
    save_codes(path, torch.tensor(take.codes), model, prompt=take.prompt, take=told)
    with replacing(path) as temporary:
        temporary.write_bytes(audio.read_bytes())
    return path


def kept(folder: str | os.PathLike) -> list[Take]:
    """The takes that the page has kept in a folder, oldest first; other files are left alone."""
    takes = []
    for audio in sorted(Path(folder).glob("*.wav"), key=lambda path: path.stat().st_mtime):
        if audio.with_suffix(ENDING).is_file():
            codes, facts = read_codes(audio)
            if "take" in facts:
                with reading(audio.with_suffix(ENDING), "move it away: the WAV file beside it stays"):
                    takes.append(Take(**json.loads(facts["take"]), codes=codes.tolist()))
    return takes


def places(takes: Sequence[Take], encoder: str) -> dict[str, tuple[float, float]]:
    """Where takes lie in the plane of their two principal axes, by id.

    Embeddings are put on the unit sphere, so that two places √(2·d) apart have the cosine distance d, as far as the
    plane shows it.
    """
    takes = [take for take in takes if take.encoder == encoder]
    if not takes:
        return {}
    points = torch.nn.functional.normalize(torch.tensor([take.embedding for take in takes]).double(), dim=1)
    points = points - points.mean(0)
    axes = torch.linalg.svd(points, full_matrices=False).Vh[:2]
    # An axis has no direction of its own: the earliest take lies on its positive side.
    places = points @ axes.T
    places = places * torch.where(places[0] < 0, -1.0, 1.0)
    places = torch.nn.functional.pad(places, (0, 2 - places.shape[1]))
    return {take.id: (round(x, 4), round(y, 4)) for take, (x, y) in zip(takes, places.tolist(), strict=True)}
