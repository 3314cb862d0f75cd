"""A policy's decoder fused for sampling: what the rollout multiplies with.

Query, key and value are one matrix, the K heads one, the K embedding tables one; LoRA is added in, the
attention scale folded into the queries, and matrices are turned into the right operand of a product. The
model itself is only read, so nothing has to be merged and unmerged around a rollout.

On a CPU large matrices are packed into the blocked layout of oneDNN: its products with a few rows are up to
four times as fast as those of plain matrices. In small models the first matrix of every MLP is packed too, for
a product that ends with the activation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from diverse_cfg.functional.codebooks import codebook_delays
from diverse_cfg.musicgen.policy import effective_weight, unwrap
from diverse_cfg.types import TextCondition

# They all compute softmax attention, which is what the loop computes; another name may mean another function.
SUPPORTED_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

# The tensors that take the requested dtype; norms, embeddings and the text projection stay in float32.
_MATRICES = frozenset(
    {"heads", "qkv", "self_out", "cross_query", "cross_key_value", "cross_out", "fc1", "fc2"}
)

_PACKED_FROM = 2**18
"""Elements of the smallest matrix that is packed: below, a call costs more than the layout saves."""

_PACKED_FOR = 64
"""Rows that the layout is made for; it suits fewer and more as well."""


@dataclass(frozen=True)
class DecoderShape:
    """What the loop needs to know of a decoder's configuration."""

    hidden_size: int
    num_heads: int
    vocab_size: int
    num_codebooks: int
    audio_channels: int
    max_positions: int
    activation: str
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def delays(self) -> list[int]:
        """Delay of each codebook in steps."""
        return codebook_delays(self.num_codebooks, self.audio_channels)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices [in, out]; `qkv` is [in, heads · (query, key, value)]."""

    self_norm: Tensor
    self_norm_bias: Tensor
    qkv: Tensor
    self_out: Tensor
    cross_norm: Tensor
    cross_norm_bias: Tensor
    cross_query: Tensor
    cross_key_value: Tensor
    cross_out: Tensor
    final_norm: Tensor
    final_norm_bias: Tensor
    fc1: Tensor
    fc2: Tensor


class RolloutWeights:
    """A fused copy of a policy's decoder, refreshed in place when the policy has changed.

    Args:
        shape: of the decoder.
        tensors: name → fused tensor, as `from_model` collects them.
        compiled: let `torch.compile` fuse each layer's small operations.
    """

    def __init__(self, shape: DecoderShape, tensors: dict[str, Tensor], compiled: bool = False) -> None:
        self.shape = shape
        self.tensors = tensors
        self.compiled = compiled
        self.loops: dict[Any, Any] = {}
        """Loops kept by `rollout` for their CUDA graphs, which stay valid as long as these tensors do."""
        self.batch_sizes: dict[Any, int] = {}
        """Clips at once that `rollout` found to fit, so that memory does not run out in every call."""
        self._group()

    def _group(self) -> None:
        """Find each layer's tensors under their names."""
        count = 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("layers."))
        names = LayerWeights.__dataclass_fields__
        self.layers = [
            LayerWeights(**{name: self.tensors[f"layers.{index}.{name}"] for name in names})
            for index in range(count)
        ]

    @classmethod
    @torch.no_grad()
    def from_model(cls, model: nn.Module, dtype: torch.dtype | None = None, compiled: bool = False) -> Self:
        """Snapshot the decoder of a policy, active LoRA adapters added.

        Args:
            model: the policy, also inside a `PeftModel`; it is not modified.
            dtype: of the matrices, the model's by default. Norms, residual stream and sampling stay in
                float32 (or the model's, if wider), so that bfloat16 costs little accuracy.
            compiled: let `torch.compile` fuse the small operations of a layer: a GPU saves launches, at the
                cost of a compilation per shape and context bucket. Needs a compiler (triton, or C++ on a
                CPU).

        Raises:
            ValueError: an attention implementation or an adapter whose effect is not known.
        """
        policy = unwrap(model)
        config = policy.decoder.config
        attention = config._attn_implementation
        if attention not in SUPPORTED_ATTENTION:
            raise ValueError(
                f"attn_implementation={attention!r} may compute another attention than the rollout does: "
                f"load the model with one of {', '.join(SUPPORTED_ATTENTION)}, or use "
                "rollout_backend='transformers'"
            )
        shape = DecoderShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            num_codebooks=config.num_codebooks,
            audio_channels=config.audio_channels,
            max_positions=config.max_position_embeddings,
            activation=config.activation_function,
            layer_norm_eps=policy.decoder.model.decoder.layer_norm.eps,
        )
        narrow: torch.dtype = policy.decoder.dtype if dtype is None else dtype
        wide = torch.promote_types(narrow, torch.float32)
        tensors = {}
        for name, tensor in _fused(policy, shape):
            # Filled by copy, so that no tensor shares memory with the model.
            if not compiled and _is_better_packed(name, tensor, narrow, shape.activation):
                tensors[name] = _packed(tensor, narrow)
                continue
            if name.split(".")[-1] in _MATRICES:
                # Laid out as [out, in] like the model's: as fast or faster for all but one or two rows.
                empty = torch.empty(tensor.shape[::-1], dtype=narrow, device=tensor.device).T
            else:
                empty = torch.empty(tensor.shape, dtype=wide, device=tensor.device)
            tensors[name] = empty.copy_(tensor)
        return cls(shape, tensors, compiled)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Copy the policy's present weights into the same tensors: captured CUDA graphs stay valid."""
        for name, tensor in _fused(unwrap(model), self.shape):
            if self.tensors[name].is_mkldnn:  # an opaque layout cannot be written into
                self.tensors[name] = _packed(tensor, self.dtype)
            else:
                self.tensors[name].copy_(tensor)
        self._group()

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.tensors["heads"].dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the rollout runs."""
        return self.tensors["heads"].device

    def project_text(self, condition: TextCondition) -> Tensor:
        """Text in the decoder's width, padding zeroed [B, Lt, D]."""
        hidden = condition.hidden_states.to(self.device, self.tensors["norm"].dtype)
        if "text.weight" in self.tensors:
            hidden = torch.matmul(hidden, self.tensors["text.weight"]) + self.tensors["text.bias"]
        return hidden * condition.attention_mask.to(hidden)[..., None]


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix [rows, out] in the matrix's dtype, which may be packed."""
    x = x.to(matrix.dtype)
    return _multiply(x, matrix, "none") if matrix.is_mkldnn else torch.mm(x, matrix)


def activated_product(x: Tensor, matrix: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(x @ matrix); in one call where a small matrix was packed for that."""
    if matrix.is_mkldnn and matrix.numel() < _PACKED_FROM:
        return _multiply(x.to(matrix.dtype), matrix, "gelu")
    return activation(product(x, matrix))


def _multiply(x: Tensor, packed: Tensor, activation: str) -> Tensor:
    # What torch's own compiler calls for frozen weights.
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, None, activation, [], "none")


def _packed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix [in, out] in oneDNN's own layout: opaque, and transposed."""
    return torch.ops.mkldnn._reorder_linear_weight.default(matrix.to(dtype).T.contiguous(), _PACKED_FOR)


def _is_better_packed(name: str, tensor: Tensor, dtype: torch.dtype, activation: str) -> bool:
    kind = name.split(".")[-1]
    if kind not in _MATRICES or tensor.device.type != "cpu":
        return False
    if tensor.numel() < _PACKED_FROM and not (kind == "fc1" and activation == "gelu"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def _fused(policy: Any, shape: DecoderShape) -> Iterator[tuple[str, Tensor]]:
    """The fused tensors of a policy, one at a time."""
    decoder = policy.decoder.model.decoder
    scale = shape.head_dim**-0.5
    yield "embedding", torch.cat([table.weight for table in decoder.embed_tokens])
    yield "positions", decoder.embed_positions.weights[: shape.max_positions]
    yield "norm", decoder.layer_norm.weight
    yield "norm_bias", decoder.layer_norm.bias
    yield "heads", torch.cat([effective_weight(head) for head in policy.decoder.lm_heads]).T
    projection = getattr(policy, "enc_to_dec_proj", None)
    if projection is not None:
        yield "text.weight", effective_weight(projection).T
        yield "text.bias", projection.bias
    for index, layer in enumerate(decoder.layers):
        own, cross = layer.self_attn, layer.encoder_attn
        yield f"layers.{index}.self_norm", layer.self_attn_layer_norm.weight
        yield f"layers.{index}.self_norm_bias", layer.self_attn_layer_norm.bias
        queries, keys, values = (effective_weight(m) for m in (own.q_proj, own.k_proj, own.v_proj))
        # Head by head, so that the queries of a product's rows and heads lie evenly spaced.
        by_head = [m.unflatten(0, (shape.num_heads, -1)) for m in (queries * scale, keys, values)]
        yield f"layers.{index}.qkv", torch.stack(by_head, dim=1).flatten(0, 2).T
        yield f"layers.{index}.self_out", effective_weight(own.out_proj).T
        yield f"layers.{index}.cross_norm", layer.encoder_attn_layer_norm.weight
        yield f"layers.{index}.cross_norm_bias", layer.encoder_attn_layer_norm.bias
        yield f"layers.{index}.cross_query", effective_weight(cross.q_proj).T * scale
        keys_values = torch.cat([effective_weight(cross.k_proj), effective_weight(cross.v_proj)])
        yield f"layers.{index}.cross_key_value", keys_values.T
        yield f"layers.{index}.cross_out", effective_weight(cross.out_proj).T
        yield f"layers.{index}.final_norm", layer.final_layer_norm.weight
        yield f"layers.{index}.final_norm_bias", layer.final_layer_norm.bias
        yield f"layers.{index}.fc1", effective_weight(layer.fc1).T
        yield f"layers.{index}.fc2", effective_weight(layer.fc2).T
