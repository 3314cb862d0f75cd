"""A transformers MusicGen as a checkpoint folder that AudioCraft loads."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import (
    EncodecModel,
    GenerationConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    T5EncoderModel,
)
from transformers.models.encodec.modeling_encodec import EncodecConvTranspose1d

from diverse_cfg.atomic import replacing
from diverse_cfg.policies.audiocraft import configuration, names
from diverse_cfg.policies.audiocraft.reading import CODEC_FILE, LANGUAGE_MODEL_FILE, TEXT_ENCODER_FOLDER
from diverse_cfg.policies.tensors import require_finite

logger = logging.getLogger(__name__)

_VERSION = "1.3.0"
# The T5s that AudioCraft loads, by width, layers, heads, feed-forward width and activation. It also lists larger ones,
# which it cannot load: their widths are filed under names that nobody has.
_TEXT_ENCODERS = {
    (512, 6, 8, 2048, "relu"): "t5-small",
    (768, 12, 12, 3072, "relu"): "t5-base",
    (1024, 24, 16, 4096, "relu"): "t5-large",
    (512, 8, 6, 1024, "gated-gelu"): "google/flan-t5-small",
    (768, 12, 12, 2048, "gated-gelu"): "google/flan-t5-base",
    (1024, 24, 16, 2816, "gated-gelu"): "google/flan-t5-large",
}


def export_audiocraft(
    model: MusicgenForConditionalGeneration,
    folder: str | os.PathLike,
    *,
    processor: Any = None,
    text_encoder: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a MusicGen as AudioCraft's `state_dict.bin` and `compression_state_dict.bin`.

    AudioCraft loads its T5 by name. Where the model's own T5 is another than that (fine-tuned, or not to be compared
    because the named one is not on this machine), its weights travel in the checkpoint; where no name fits, they lie
    beside it in `text_encoder/`, from where this package reads them.

    Args:
        model: full weights, adapters merged.
        folder: to write; created.
        processor: the model's processor or tokenizer; needed for a T5 that AudioCraft does not know.
        text_encoder: name of the T5 that AudioCraft shall load; by default found by its size.
        dtype: of the language model's tensors; by default as they are. The released checkpoints are float16.

    Returns:
        The folder. Beside the two files it holds `generation_config.json`, which keeps length and sampling.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        ValueError: the model has unmerged adapters, weights that are not finite, or something that
            AudioCraft's MusicGen lacks.
    """
    folder = Path(folder)
    for name in (LANGUAGE_MODEL_FILE, CODEC_FILE, "config.json"):
        if (folder / name).exists():
            raise FileExistsError(f"{folder} holds {name} already: choose another folder")
    _require_merged(model)
    require_finite(model.state_dict(), model.config._name_or_path or "the model")
    configuration.require_convertible(model.config)
    generation = model.generation_config or GenerationConfig()
    name = text_encoder or known_text_encoder(model.config)
    beside = name is None
    if beside and processor is None:
        raise ValueError(
            "the model's text encoder is none that AudioCraft knows (t5-small, t5-base, …): pass processor=…, so that "
            "it can be written beside the checkpoint, or text_encoder=… to name the T5 to load"
        )
    travels = not beside and not _is_same(model.text_encoder, name)
    of_model, of_codec = configuration.audiocraft_configs(
        model.config, generation, name or TEXT_ENCODER_FOLDER, finetuned_text_encoder=travels
    )
    folder.mkdir(parents=True, exist_ok=True)
    if beside:
        model.text_encoder.save_pretrained(folder / TEXT_ENCODER_FOLDER)
        getattr(processor, "tokenizer", processor).save_pretrained(folder / TEXT_ENCODER_FOLDER)
        logger.warning(
            "AudioCraft by itself loads only T5s that it knows, and this model has its own, written beside it as %s/: "
            "this package reads the folder, and gives a live MusicGen with to_audiocraft(load_policy(folder))",
            TEXT_ENCODER_FOLDER,
        )
    generation.save_pretrained(folder)
    _save(codec_state(model.audio_encoder), of_codec, folder / CODEC_FILE)
    _save(language_model_state(model, travels, dtype), of_model, folder / LANGUAGE_MODEL_FILE)
    if generation.guidance_scale in (None, 1.0):
        logger.warning(
            "this model has its guidance inside, and AudioCraft guides unless told otherwise: call "
            "set_generation_params(cfg_coef=1.0) there, and diverse_cfg.without_null_rows(model) for half the cost"
        )
    return folder


def language_model_state(
    model: MusicgenForConditionalGeneration, with_text_encoder: bool = False, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Decoder, heads and projection (and the text encoder) under AudioCraft's names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(names.CODEC) or name.endswith("embed_positions.weights"):
            continue
        if name.startswith(names.TEXT_ENCODER):
            if with_text_encoder:
                state[name] = tensor.cpu()
        else:
            state[name] = tensor.to("cpu", dtype)
    return names.language_model_to_audiocraft(state)


def codec_state(codec: EncodecModel) -> dict[str, Tensor]:
    """The codec under AudioCraft's names."""
    transposed = frozenset(
        name for name, module in codec.named_modules() if isinstance(module, EncodecConvTranspose1d)
    )
    return {names.codec_name(name, transposed): tensor.cpu() for name, tensor in codec.state_dict().items()}


def _require_merged(model: MusicgenForConditionalGeneration) -> None:
    if not isinstance(model, MusicgenForConditionalGeneration):
        raise ValueError(
            f"expected a MusicgenForConditionalGeneration, got a {type(model).__name__}; of a PeftModel, pass "
            "merge_and_unload()"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has unmerged adapters: call merge_and_unload() on the PeftModel first")


def known_text_encoder(config: MusicgenConfig) -> str | None:
    """Name of the T5 of this size that AudioCraft loads; None if it has none."""
    text = config.text_encoder
    size = (text.d_model, text.num_layers, text.num_heads, text.d_ff, text.feed_forward_proj)
    return _TEXT_ENCODERS.get(size) if text.vocab_size == 32128 else None


def _is_same(encoder: T5EncoderModel, name: str) -> bool:
    """Whether the T5 of that name is on this machine and has these weights."""
    try:
        named = T5EncoderModel.from_pretrained(name, dtype=torch.float32, local_files_only=True).state_dict()
    except (OSError, ValueError):
        return False
    own = encoder.state_dict()
    return own.keys() == named.keys() and all(torch.equal(own[key].cpu().float(), named[key]) for key in own)


def _save(state: dict[str, Tensor], config: dict[str, Any], path: Path) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path.name} would hold NaN or infinite values in {name}: the model's training broke, or "
                f"{str(tensor.dtype).removeprefix('torch.')} is too narrow for it (then take float32)"
            )
    package = {
        # Clones, since a view is saved with all of what it looks at.
        "best_state": {name: tensor.detach().clone() for name, tensor in state.items()},
        "xp.cfg": yaml.safe_dump(config, sort_keys=False),
        "version": _VERSION,
        "exported": True,
    }
    with replacing(path) as temporary:
        torch.save(package, temporary)
