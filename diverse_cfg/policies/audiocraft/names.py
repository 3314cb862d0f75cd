"""Tensor names of AudioCraft's MusicGen and of transformers', in both directions.

The two programs hold the same numbers under other names. Only one thing is stored differently: AudioCraft
fuses the query, key and value projections of an attention into one matrix.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

DESCRIPTION = "condition_provider.conditioners.description."
TEXT_ENCODER = "text_encoder."
CODEC = "audio_encoder."

_DECODER = "decoder.model.decoder."
# Longest first where one is the beginning of another. Each pair is undone by reading it from right to left.
_PREFIXES = (
    ("emb.", _DECODER + "embed_tokens."),
    ("transformer.", _DECODER),
    ("out_norm.", _DECODER + "layer_norm."),
    ("linears.", "decoder.lm_heads."),
    (DESCRIPTION + "output_proj.", "enc_to_dec_proj."),
    (DESCRIPTION + "t5.", TEXT_ENCODER),
)
_LAYER = (
    (".cross_attention.", ".encoder_attn."),
    (".norm_cross.", ".encoder_attn_layer_norm."),
    (".linear1.", ".fc1."),
    (".linear2.", ".fc2."),
    (".norm1.", ".self_attn_layer_norm."),
    (".norm2.", ".final_layer_norm."),
)
_FUSED = ".in_proj_weight"
_PROJECTIONS = (".q_proj.weight", ".k_proj.weight", ".v_proj.weight")


def language_model_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an AudioCraft LM under transformers' names; what has no place there keeps its own."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        # `nn.MultiheadAttention` hides one level deeper than AudioCraft's own attention.
        converted = _replace_prefix(name.replace(".mha.", "."), _PREFIXES)
        if converted.startswith(_DECODER + "layers."):
            converted = _replace(converted, _LAYER)
        if converted.endswith(_FUSED):
            stem = converted.removesuffix(_FUSED)
            for projection, part in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
                result[stem + projection] = part.contiguous()
        else:
            result[converted] = tensor
    return result


def language_model_to_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `language_model_to_transformers`, for decoder, heads, projection and text encoder."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_PROJECTIONS[1:]) and name.startswith(_DECODER):
            continue  # taken along with the query's
        if name.endswith(_PROJECTIONS[0]) and name.startswith(_DECODER):
            stem = name.removesuffix(_PROJECTIONS[0])
            tensor = torch.cat([state[stem + projection] for projection in _PROJECTIONS])
            name = stem + _FUSED
        result[language_model_name(name)] = tensor
    return result


def language_model_name(name: str) -> str:
    """What AudioCraft calls one tensor of a transformers MusicGen (its fused matrix for q, k and v)."""
    for projection in _PROJECTIONS:
        if name.startswith(_DECODER) and name.endswith(projection):
            name = name.removesuffix(projection) + _FUSED
    if name.startswith(_DECODER + "layers."):
        name = _replace(name, [(new, old) for old, new in _LAYER])
    # `decoder.model.decoder.` is the beginning of two others.
    inverse = sorted(((new, old) for old, new in _PREFIXES), key=lambda pair: -len(pair[0]))
    return _replace_prefix(name, inverse)


_TO_CODEC = (
    (re.compile(r"^(encoder|decoder)\.model\."), r"\1.layers."),
    (re.compile(r"\.(?:conv\.conv|convtr\.convtr)\."), ".conv."),
    (re.compile(r"^quantizer\.vq\.layers\.(\d+)\._codebook\."), r"quantizer.layers.\1.codebook."),
    (re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
)


def codec_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an AudioCraft EnCodec under the names of transformers' (without `audio_encoder.`)."""
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in _TO_CODEC:
            name = pattern.sub(replacement, name)
        result[name] = tensor
    return result


def codec_name(name: str, transposed: frozenset[str]) -> str:
    """What AudioCraft calls one tensor of a transformers EnCodec.

    Args:
        name: without `audio_encoder.`.
        transposed: layers of the decoder (such as "decoder.layers.3") that are transposed convolutions,
            which have a name of their own in AudioCraft.
    """
    for ours, theirs in ((".original0", ".weight_g"), (".original1", ".weight_v")):
        name = re.sub(rf"\.parametrizations\.weight{ours}$", theirs, name)
    name = re.sub(r"^quantizer\.layers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook.", name)
    layer = ".".join(name.split(".")[:3])
    name = name.replace(".conv.", ".convtr.convtr." if layer in transposed else ".conv.conv.")
    return re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)


def _replace(name: str, pairs) -> str:
    for old, new in pairs:
        if old in name:
            return name.replace(old, new)
    return name


def _replace_prefix(name: str, pairs) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
