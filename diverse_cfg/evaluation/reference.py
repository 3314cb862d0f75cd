"""Reference audio: a folder of recordings as embeddings, for the distances to real music."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from diverse_cfg.evaluation.cache import Cache, digest, file_digest
from diverse_cfg.evaluation.features import EmbeddingFeature

_EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")


def reference_embeddings(
    folder: str | Path, feature: EmbeddingFeature, clip_seconds: float, cache: Cache
) -> np.ndarray:
    """Embeddings of the audio files of a folder, cut into clips of the length that is evaluated [C, D].

    Each file has its own sampling rate, which the encoder is told. Files shorter than a clip are left out.

    Args:
        folder: with audio files, also in folders below.
        feature: of the held-out encoder; it must read waveforms.
        clip_seconds: length of a clip.
        cache: where the embeddings are kept.

    Raises:
        FileNotFoundError: no such folder, or no audio in it.
        ValueError: an encoder that reads codes, a file that is no audio, or fewer than two clips.
    """
    folder = Path(folder)
    if feature.embedder.reads != "waveforms":
        raise ValueError(
            f"encoder {feature.embedder.name!r} reads codes, and reference audio has none: take one that "
            "reads waveforms as heldout_encoder"
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"reference folder {folder} holds no audio ({', '.join(_EXTENSIONS)})")
    description = {
        "files": digest([file_digest(path) for path in files]),
        "clip_seconds": clip_seconds,
        **feature.fingerprint,
    }
    kept = cache.load("reference", description)
    if kept is not None:
        return kept["values"]
    parts = [_embed(path, feature, clip_seconds) for path in files]
    values = np.concatenate([part for part in parts if part is not None] or [np.empty((0, 1))])
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < 2:
        raise ValueError(
            f"{folder} gives {len(values)} clips of {clip_seconds:g} s, and a distribution needs at least "
            "2: add files"
        )
    cache.save("reference", description, {"values": values})
    return values


def _embed(path: Path, feature: EmbeddingFeature, clip_seconds: float) -> np.ndarray | None:
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as audio ({error}): remove or repair it") from error
    length = round(clip_seconds * rate)
    mono = torch.from_numpy(audio).mean(dim=1)
    count = len(mono) // length
    if not count:
        return None
    return feature.embed(mono[: count * length].view(count, length), rate)
