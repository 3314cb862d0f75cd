"""How many clips at once: as many as memory takes, and fewer when it runs out all the same."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from transformers import MusicgenDecoderConfig

from diverse_cfg.functional.codebooks import num_decoder_steps
from diverse_cfg.policies.musicgen.model import codebook_delays, unwrap

logger = logging.getLogger(__name__)

_LARGEST_BATCH = 64
_LARGEST_GPU_BATCH = 256
# What the caches of a batch may take where nobody chose a batch size: a CPU that runs out of memory does not
# always raise, it may be killed.
_CPU_CACHE_BYTES = 2 << 30
_GPU_CACHE_SHARE = 0.5
# Caches up to this share of a GPU's memory are kept for the next call, with their graphs; larger ones are
# freed, for a training step wants the memory, and beside so long a rollout a new capture takes little time.
_GPU_KEPT_SHARE = 1 / 16

# Lack of memory that torch reports as a plain RuntimeError: its CPU allocator, two libraries, the driver.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)

T = TypeVar("T")


def cache_bytes(
    config: MusicgenDecoderConfig, num_frames: int, guided: bool, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that one clip's keys and values take while it is sampled; those of its text are few, and left out.

    2 · layers · hidden units · decoder steps · bytes of a number, and twice that with guidance.

    Args:
        config: of the decoder.
        num_frames: T.
        guided: whether the clip is decoded twice.
        dtype: of the rollout's matrices.
        device: where it is sampled: the CPU's loop keeps its caches in float32.
    """
    itemsize = dtype.itemsize if device.type == "cuda" else max(dtype.itemsize, torch.float32.itemsize)
    steps = num_decoder_steps(num_frames, codebook_delays(config.num_codebooks, config.audio_channels))
    return 2 * config.num_hidden_layers * config.hidden_size * steps * itemsize * (2 if guided else 1)


def automatic_batch(model: nn.Module, num_frames: int, guided: bool, dtype: torch.dtype) -> int:
    """As many clips as have room for their keys and values.

    Args:
        model: the policy, whose shape and device count.
        num_frames: T.
        guided: whether every clip is decoded twice.
        dtype: of the rollout's matrices.
    """
    policy = unwrap(model)
    on_gpu = policy.device.type == "cuda"
    clip_bytes = cache_bytes(policy.decoder.config, num_frames, guided, dtype, policy.device)
    if not on_gpu:
        return max(1, min(_LARGEST_BATCH, _CPU_CACHE_BYTES // clip_bytes))
    free, _ = torch.cuda.mem_get_info(policy.device)
    # What torch holds without using it (a training step's activations, say) is free, too.
    free += torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    return max(1, min(_LARGEST_GPU_BATCH, int(_GPU_CACHE_SHARE * free) // clip_bytes))


def may_be_kept(nbytes: int, device: torch.device) -> bool:
    """Whether caches of this size may stay on the device between two calls."""
    if device.type != "cuda":
        return True
    return nbytes <= _GPU_KEPT_SHARE * torch.cuda.mem_get_info(device)[1]


def in_batches(
    total: int,
    batch_size: int,
    run: Callable[[slice], T],
    remember: Callable[[int], None] | None = None,
) -> list[T]:
    """Call `run` on consecutive slices of `total` rows; when memory runs out, go on with half the rows.

    The slices are of equal length, or nearly: shapes that recur can use a GPU's graphs again.

    Args:
        total: number of rows.
        batch_size: most rows of a slice.
        run: the work on a slice.
        remember: told the new size when memory ran out.

    Raises:
        torch.OutOfMemoryError: one row does not fit.
    """
    results: list[T] = []
    start = 0
    while start < total:
        missing = total - start
        size = -(-missing // -(-missing // batch_size))
        try:
            results.append(run(slice(start, start + size)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise torch.OutOfMemoryError(
                    f"out of memory with one clip at once: {error}. Ask for shorter clips, take dtype=bfloat16, "
                    "or free memory that other programs and models hold"
                ) from error
            message = str(error)
        else:
            start += size
            continue
        # Outside of the handler: inside, the traceback would keep the failed batch's tensors alive.
        batch_size = (size + 1) // 2
        logger.warning("out of memory, going on with %d clips at once: %s", batch_size, message)
        if remember is not None:
            remember(batch_size)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, its libraries or Python says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(phrase in str(error) for phrase in _OUT_OF_MEMORY)
