"""Of many samples of a prompt the few that differ most: variety for rows of the decoder, without training."""

from torch import Tensor

from diverse_cfg.acoustics import validity
from diverse_cfg.embeddings import Embedder
from diverse_cfg.functional.diversity import farthest_points
from diverse_cfg.rewards import embed_clips, embedding_distances
from diverse_cfg.types import Clips


def diverse_subset(clips: Clips, count: int, embedder: Embedder) -> list[int]:
    """Rows of the `count` clips of one prompt that differ most under an encoder, the first sound clip among them.

    Clips that are no sound music (see `acoustics.validity`) only fill up where there are too few others: nothing is as
    different as a broken one. The same clips give the same rows.

    Args:
        clips: M samples of one prompt, with waveforms.
        count: G ≤ M.
        embedder: the space in which they differ, such as `load_embedder` gives.

    Raises:
        ValueError: more than there are, clips without waveforms, codes of another codec than the encoder reads, or a
            clip without an embedding.
    """
    if not 1 <= count <= len(clips):
        raise ValueError(f"count={count} must be at least 1 and at most the number of clips, {len(clips)}")
    if clips.waveforms is None:
        raise ValueError(
            "the clips have no waveforms, in which broken ones are heard: sample with decode=True"
        )
    if embedder.reads == "codes" and embedder.sampling_rate != clips.sampling_rate:
        raise ValueError(
            f"encoder {embedder.name!r} reads codes of a {embedder.sampling_rate} Hz codec, the clips' has "
            f"{clips.sampling_rate} Hz: take an encoder that reads waveforms"
        )
    valid = validity(clips.waveforms, clips.sampling_rate)["valid"].bool()
    inputs = clips.codes if embedder.reads == "codes" else clips.waveforms

    def farthest(rows: Tensor, number: int) -> list[int]:
        if len(rows) <= number:
            return rows.tolist()
        embeddings = embed_clips(embedder, inputs[rows], clips.sampling_rate)
        (distances,) = embedding_distances(embedder, embeddings.double(), len(rows))
        return [int(rows[point]) for point in farthest_points(distances, number)]

    kept = farthest(valid.nonzero()[:, 0], count)
    return kept if len(kept) == count else kept + farthest((~valid).nonzero()[:, 0], count - len(kept))
