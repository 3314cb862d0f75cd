"""Load a MusicGen policy from whatever holds one: float32, no dropout, no double guidance.

A checkpoint that this package distilled has the guidance inside its weights, while the generation config that
an adapter inherits from its base still asks for guidance 3: applied twice, it costs twice and overshoots. So
adapters, and folders whose `diverse_cfg.json` says student or merge, come back with
`generation_config.guidance_scale = 1.0`.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, MusicgenForConditionalGeneration, MusicgenProcessor

from diverse_cfg.musicgen.audiocraft.folders import find_file, looks_local, transformers_folder
from diverse_cfg.musicgen.audiocraft.live import from_audiocraft, is_live_audiocraft
from diverse_cfg.provenance import PROVENANCE_FILE, read_provenance

ModelSource = Any
"""Id or folder, a transformers or PEFT model, or a live AudioCraft model."""

# Attributes that transformers hands to functional dropout; `nn.Dropout` modules alone are not all of it.
_DROPOUT_ATTRIBUTES = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")


def load_policy(
    model: ModelSource,
    *,
    adapter: str | os.PathLike | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> MusicgenForConditionalGeneration:
    """Load a MusicGen policy, in eval mode and without any dropout.

    Args:
        model: Hub id or folder of a full checkpoint, also one of AudioCraft's; id or folder of a PEFT
            adapter, whose base is read from its own configuration; or a live model (also one that PEFT
            wrapped), which is prepared in place and returned. A live AudioCraft MusicGen, or a pair
            (LMModel, compression_model), is copied into transformers' class.
        adapter: id or folder of a PEFT adapter to merge into `model`.
        torch_dtype: of the text encoder and the decoder; the codec always stays in float32. Adapters are
            merged in float32 before the cast. Half precision on disk is upcast: a step of 1e-4 vanishes in
            bfloat16.

    Returns:
        A plain `MusicgenForConditionalGeneration`, adapters merged. Its `generation_config.guidance_scale` is
        1.0 when the checkpoint is distilled, and what the checkpoint says otherwise.

    Raises:
        ValueError: nothing there, not a MusicGen, MusicGen-Melody, special tokens that do not fit, or an
            adapter whose base is unknown.
    """
    policy: Any
    if is_live_audiocraft(model):
        policy, distilled = from_audiocraft(model)[0], False
    elif isinstance(model, nn.Module):
        policy = unwrap(model)
        distilled = isinstance(model, PeftModel)
    else:
        source = os.fspath(model)
        if _is_adapter(source):
            if adapter is not None:
                raise ValueError(
                    f"{source} is an adapter itself: pass its base as the model, or leave out adapter="
                )
            adapter, source = source, _base_of(source)
        policy = _load_full(source)
        distilled = is_distilled(source)
    if adapter is not None:
        policy = _merge_adapter(policy, os.fspath(adapter))
    if distilled or adapter is not None:
        policy.generation_config.guidance_scale = 1.0
        policy.is_distilled = True  # `fast_generate` warns when it is guided on top
    zero_dropout(policy)
    positions = policy.decoder.model.decoder.embed_positions
    rounded = positions.weights.dtype != torch.float32
    policy.to(torch_dtype)
    if rounded:  # the table is computed, not stored: widened, it would stay rounded
        positions.make_weights(*positions.weights.shape)
    policy.audio_encoder.float()
    return policy.eval()


def load_processor(path: str | os.PathLike) -> MusicgenProcessor:
    """Load the processor (tokenizer, feature extractor) of a checkpoint; an adapter falls back on its base.

    Raises:
        ValueError: nothing there, or not MusicGen's processor.
    """
    source = os.fspath(path)
    _require_there(source)
    source = transformers_folder(source)
    if not any(find_file(source, name) for name in ("processor_config.json", "preprocessor_config.json")):
        if not _is_adapter(source):
            raise ValueError(
                f"{source} has no processor (processor_config.json or preprocessor_config.json): copy the "
                "tokenizer and processor files of its base model into it"
            )
        source = transformers_folder(_base_of(source))
    processor = AutoProcessor.from_pretrained(source)
    if not isinstance(processor, MusicgenProcessor):
        raise ValueError(
            f"{source} has a {type(processor).__name__}, not a MusicgenProcessor: is it a MusicGen?"
        )
    return processor


def unwrap(model: nn.Module) -> Any:
    """The MusicGen inside a `PeftModel` (its LoRA layers stay active) or a DDP-like wrapper.

    Returns:
        A `MusicgenForConditionalGeneration`; typed as anything, since transformers declares its three parts
        optional.

    Raises:
        ValueError: it is another model.
    """
    inner = model.module if hasattr(model, "module") else model
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    if not isinstance(inner, MusicgenForConditionalGeneration):
        raise ValueError(
            f"expected a MusicgenForConditionalGeneration, got a {type(inner).__name__}: MusicGen-Melody "
            "and other models are not supported"
        )
    return inner


def is_distilled(source: str | os.PathLike) -> bool:
    """Whether a teacher's guidance is in the weights: a student, a merge of students, an adapter."""
    source = os.fspath(source)
    if _is_adapter(source):
        return True
    provenance = find_file(source, PROVENANCE_FILE)
    return provenance is not None and read_provenance(Path(provenance).parent) is not None


def zero_dropout(model: nn.Module) -> None:
    """Set every dropout and layerdrop of the model to zero, in place.

    The policy that is sampled must be the policy that is trained, also in `train()` mode, which gradient
    checkpointing needs. `disable_dropout` of other libraries misses the rates that are plain float
    attributes.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_ATTRIBUTES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _load_full(source: str) -> MusicgenForConditionalGeneration:
    _require_there(source)
    folder = transformers_folder(source)
    config = _read_json(folder, "config.json")
    if config is None:
        raise ValueError(
            f"{source} has no config.json: it is neither a MusicGen checkpoint, nor AudioCraft's (state_dict."
            "bin and compression_state_dict.bin), nor an adapter (for a Hub id, check the spelling and "
            "whether the Hub can be reached; the shipped base is diverse_cfg.nano_path())"
        )
    kind = config.get("model_type")
    if kind == "musicgen_melody":
        raise ValueError(
            f"{source} is a MusicGen-Melody model, which reads its condition as a prefix and not by "
            "cross-attention: use a MusicGen without melody, such as facebook/musicgen-small"
        )
    if kind != "musicgen":
        raise ValueError(
            f"{source} is a {kind!r} model, not a MusicGen; use a checkpoint such as facebook/musicgen-small"
        )
    policy = MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    policy.name_or_path = policy.config._name_or_path = source  # adapters name their base by it
    decoder: Any = policy.config.decoder
    if decoder.pad_token_id != decoder.vocab_size:
        raise ValueError(
            f"{source} has config.decoder.pad_token_id={decoder.pad_token_id}, but MusicGen's only special "
            f"token is {decoder.vocab_size} (vocab_size): another program overwrote it; set pad, bos and "
            f"decoder_start to {decoder.vocab_size} in config.json and generation_config.json"
        )
    return policy


def _merge_adapter(
    policy: MusicgenForConditionalGeneration, adapter: str
) -> MusicgenForConditionalGeneration:
    _require_there(adapter)
    if find_file(adapter, "adapter_config.json") is None:
        raise ValueError(f"{adapter} has no adapter_config.json: it is not a PEFT adapter")
    return PeftModel.from_pretrained(policy, adapter).merge_and_unload()


def _is_adapter(source: str) -> bool:
    _require_there(source)
    if find_file(source, "adapter_config.json") is None:
        return False
    if find_file(source, "config.json") is not None:
        raise ValueError(
            f"{source} holds an adapter and a full checkpoint: move one of them into a folder of its own, "
            "since a merged checkpoint with its adapter on top would be adapted twice"
        )
    return True


def _base_of(adapter: str) -> str:
    base = (_read_json(adapter, "adapter_config.json") or {}).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{adapter} does not name its base model: call load_policy(base, adapter={adapter!r})"
        )
    if looks_local(base) and not os.path.isdir(base):
        raise ValueError(
            f"{adapter} names {base} as its base model, which is not here: call load_policy(base, "
            f"adapter={adapter!r})"
        )
    return base


def _require_there(source: str) -> None:
    if looks_local(source) and not os.path.isdir(source):
        raise ValueError(
            f"there is no folder {source}: pass a checkpoint folder or a Hub id such as owner/name"
        )


def _read_json(source: str, name: str) -> dict[str, Any] | None:
    path = find_file(source, name)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): download or save the checkpoint again"
        ) from error
