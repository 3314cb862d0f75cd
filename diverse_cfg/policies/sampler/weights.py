"""A policy's decoder fused for sampling: what the rollout multiplies with.

Query, key and value are one matrix, the K heads one, the K embedding tables one; LoRA is added in, the
attention scale folded into the queries, and matrices are turned into the right operand of a product. The
model itself is only read, so nothing has to be merged and unmerged around a rollout.

The model's own forward pass is not run, so whatever it does besides stock MusicGen would be lost without a
word: every layer is checked before the first tensor is copied. What a forward hook changes cannot be seen.

On a CPU large matrices are packed into the blocked layout of oneDNN: its products with a few rows are up to
four times as fast as those of plain matrices. In small models the first matrix of every MLP is packed too, for
a product that ends with the activation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diverse_cfg.policies.layers import base_layer, effective_weight
from diverse_cfg.policies.musicgen.model import delays, unwrap
from diverse_cfg.policies.shift import SHIFT, interpolate
from diverse_cfg.types import TextCondition

# They all compute softmax attention, which is what the loop computes; another name may mean another function.
_SUPPORTED_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

# The tensors that take the requested dtype; norms, embeddings and the text projection stay in float32.
_MATRICES = frozenset(
    {"heads", "qkv", "self_out", "cross_query", "cross_key_value", "cross_out", "fc1", "fc2"}
)

_PACKED_FROM = 2**18
"""Elements of the smallest matrix that is packed: below, a call costs more than the layout saves."""

_PACKED_FOR = 64
"""Rows that the layout is made for; it suits fewer and more as well."""

_ELSE = "or use rollout_backend='transformers'"


@dataclass(frozen=True)
class _DecoderShape:
    """What the loop needs to know of a decoder's configuration."""

    hidden_size: int
    num_heads: int
    vocab_size: int
    num_codebooks: int
    delays: tuple[int, ...]
    """Of each codebook, in steps."""
    max_positions: int
    activation: str
    layer_norm_eps: float
    num_layers: int
    ffn_size: int
    text_size: int | None
    """Width of the text encoder, where it is projected into the decoder's."""
    knots: tuple[float, ...] = ()
    """γ of the table of a student that is told γ."""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The shape of a policy's decoder."""
        policy = unwrap(model)
        config, decoder = policy.decoder.config, policy.decoder.model.decoder
        projected = getattr(policy, "enc_to_dec_proj", None) is not None
        return cls(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            num_codebooks=config.num_codebooks,
            delays=delays(policy),
            max_positions=config.max_position_embeddings,
            activation=config.activation_function,
            layer_norm_eps=getattr(decoder.layer_norm, "eps", 0.0),
            num_layers=len(decoder.layers),
            ffn_size=config.ffn_dim,
            text_size=policy.text_encoder.config.hidden_size if projected else None,
            knots=getattr(policy, SHIFT).guidance.knots if hasattr(policy, SHIFT) else (),
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


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
    """

    def __init__(self, shape: _DecoderShape, tensors: dict[str, Tensor]) -> None:
        self.shape = shape
        self.tensors = tensors
        self.loops: dict[Any, Any] = {}
        """Loops kept by `rollout` for their CUDA graphs, which stay valid as long as these tensors do."""
        self.batch_sizes: dict[Any, int] = {}
        """Clips at once that `rollout` found to fit, so that memory does not run out in every call."""
        self._group()

    def _group(self) -> None:
        """Find each layer's tensors under their names."""
        names = LayerWeights.__dataclass_fields__
        self.layers = [
            LayerWeights(**{name: self.tensors[f"layers.{index}.{name}"] for name in names})
            for index in range(self.shape.num_layers)
        ]

    @classmethod
    # Tensors made in inference mode could not be refreshed outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def from_model(cls, model: nn.Module, dtype: torch.dtype | None = None) -> Self:
        """Snapshot the decoder of a policy, active LoRA adapters added.

        Args:
            model: the policy, also inside a `PeftModel`; it is not modified. Its forward hooks are not run:
                one that changes a layer's output is not seen.
            dtype: of the matrices, the model's by default. Norms, residual stream and sampling stay in
                float32 (or the model's, if wider), so that bfloat16 costs little accuracy.

        Raises:
            ValueError: an attention implementation, adapter, or kind of layer whose effect is not known;
                weights that are quantised, sharded, offloaded or on several devices; a bias that stock
                MusicGen has not; a dtype that is not of floating point.
        """
        policy = unwrap(model)
        narrow = policy.decoder.dtype if dtype is None else dtype
        if not isinstance(narrow, torch.dtype) or not narrow.is_floating_point:
            raise ValueError(f"dtype={narrow!r} must be a floating-point torch.dtype such as torch.bfloat16")
        wide = torch.promote_types(narrow, torch.float32)
        shape = _DecoderShape.of(policy)
        device = _require_fusable(policy, shape)
        tensors = {}
        for name, tensor in _fused(policy, shape):
            # Filled by copy, so that no tensor shares memory with the model.
            if _is_better_packed(name, tensor, narrow, shape.activation):
                tensors[name] = _packed(tensor, narrow)
                continue
            if name.split(".")[-1] in _MATRICES:
                # Laid out as [out, in] like the model's: as fast or faster for all but one or two rows.
                empty = torch.empty(tensor.shape[::-1], dtype=narrow, device=device).T
            else:
                empty = torch.empty(tensor.shape, dtype=wide, device=device)
            tensors[name] = empty.copy_(tensor)
        return cls(shape, tensors)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Copy the policy's present weights into the same tensors: captured CUDA graphs stay valid.

        Args:
            model: the policy, on the device of the snapshot.

        Raises:
            ValueError: a model of another shape or on another device, or one that `from_model` would refuse;
                the snapshot is as it was.
        """
        policy = unwrap(model)
        device = _require_fusable(policy, _DecoderShape.of(policy))
        self.require_fits(policy)
        if device != self.device:
            raise ValueError(
                f"the snapshot is on {self.device}, the model on {device}: move the model back, or take a new "
                "snapshot with RolloutWeights.from_model"
            )
        dtype = self.dtype
        for name, tensor in _fused(policy, self.shape):
            target = self.tensors[name]
            if target.is_mkldnn:  # an opaque layout cannot be written into
                self.tensors[name] = _packed(tensor, dtype)
            else:
                target.copy_(tensor)
        self._group()

    def require_fits(self, model: nn.Module) -> None:
        """Raise unless this could be a snapshot of a model; only shapes are compared, not weights.

        Raises:
            ValueError: naming what differs.
        """
        shape = _DecoderShape.of(model)
        if shape != self.shape:
            ours, theirs = asdict(self.shape), asdict(shape)
            differing = [name for name in ours if ours[name] != theirs[name]]
            snapshot, wanted = (", ".join(f"{n}={s[n]!r}" for n in differing) for s in (ours, theirs))
            raise ValueError(
                f"the snapshot is of a decoder with {snapshot}, the model has {wanted}: take a snapshot of "
                "this model with RolloutWeights.from_model"
            )

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
            bias = self.tensors["text.bias"]
            if condition.guidance is not None:
                told = condition.guidance.to(self.device)
                bias = (bias + interpolate(self.tensors["text.shift"], self.shape.knots, told))[:, None]
            hidden = torch.matmul(hidden, self.tensors["text.weight"]) + bias
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


class _Source(NamedTuple):
    """A layer that the snapshot reads, and what it has to be."""

    layer: Any
    kind: type[nn.Module]
    size: tuple[int, ...]
    has_bias: bool


def _sources(policy: Any, shape: _DecoderShape) -> Iterator[_Source]:
    """Every layer that `_fused` reads, but for the table of positions."""
    decoder, size = policy.decoder.model.decoder, shape.hidden_size
    for table in decoder.embed_tokens:
        yield _Source(table, nn.Embedding, (shape.vocab_size + 1, size), False)
    yield _Source(decoder.layer_norm, nn.LayerNorm, (size,), True)
    for head in policy.decoder.lm_heads:
        yield _Source(head, nn.Linear, (shape.vocab_size, size), False)
    if shape.text_size is not None:
        yield _Source(policy.enc_to_dec_proj, nn.Linear, (size, shape.text_size), True)
    for layer in decoder.layers:
        for norm in (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm):
            yield _Source(norm, nn.LayerNorm, (size,), True)
        for attention in (layer.self_attn, layer.encoder_attn):
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
                yield _Source(part, nn.Linear, (size, size), False)
        yield _Source(layer.fc1, nn.Linear, (shape.ffn_size, size), False)
        yield _Source(layer.fc2, nn.Linear, (size, shape.ffn_size), False)


def _require_fusable(policy: Any, shape: _DecoderShape) -> torch.device:
    """Raise unless the loop computes what the decoder does; nothing is copied or computed for that.

    Returns:
        The device that all weights are on; MusicGen itself moves the positions to it.

    Raises:
        ValueError: naming the module and the remedy.
    """
    attention = policy.decoder.config._attn_implementation
    if attention not in _SUPPORTED_ATTENTION:
        raise ValueError(
            f"attn_implementation={attention!r} may compute another attention than the rollout does: "
            f"load the model with one of {', '.join(_SUPPORTED_ATTENTION)}, {_ELSE}"
        )
    table = policy.decoder.model.decoder.embed_positions.weights
    positions = (shape.max_positions, shape.hidden_size)
    problem = _problem_of_tensor(table[: shape.max_positions], positions, table.device)
    if problem:
        raise ValueError(f"decoder.model.decoder.embed_positions {problem}, {_ELSE}")
    device = next(policy.decoder.parameters()).device
    for source in _sources(policy, shape):
        problem = _problem(source, shape, device)
        if problem:
            name = next(name for name, module in policy.named_modules() if module is source.layer)
            raise ValueError(f"{name} {problem}, {_ELSE}")
    return device


def _problem(source: _Source, shape: _DecoderShape, device: torch.device) -> str | None:
    """Why a layer cannot be fused, with a remedy."""
    layer, kind, size, has_bias = source
    try:
        base = base_layer(layer)
    except ValueError as error:
        return f"cannot be fused: {error}"
    # FSDP makes subclasses that inherit `forward`; accelerate's hooks replace it and move tensors only.
    if type(base).forward is not kind.forward or ("forward" in vars(base) and not hasattr(base, "_hf_hook")):
        return (
            f"is a {type(base).__module__}.{type(base).__name__} with a forward of its own, not the plain "
            f"{kind.__name__} that the rollout computes: load the model without quantisation and patches"
        )
    if kind is nn.LayerNorm and base.eps != shape.layer_norm_eps:
        return f"has eps={base.eps}, the last norm {shape.layer_norm_eps}: give all norms the same"
    if kind is nn.Embedding and base.max_norm is not None:
        return f"has max_norm={base.max_norm}, which changes rows when they are read: set it to None"
    bias = None if kind is nn.Embedding else base.bias
    if (bias is None) is has_bias:
        return f"has {'no' if has_bias else 'a'} bias, unlike stock MusicGen: load a model of that form"
    problem = _problem_of_tensor(base.weight, size, device)
    if problem is None and bias is not None:
        problem = _problem_of_tensor(bias, size[:1], device)
    return problem


def _problem_of_tensor(tensor: Tensor, size: tuple[int, ...], device: torch.device) -> str | None:
    """Why a tensor cannot be copied, with a remedy."""
    if tensor.is_meta:
        return "is on the meta device (offloaded, or never loaded): load the whole model on one device"
    if tensor.device != device:
        return f"is on {tensor.device}, the first weights on {device}: load the whole model on one device"
    if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
        return f"has weights of type {type(tensor).__name__}: gather shards, or load without quantisation"
    if not tensor.is_floating_point():
        return f"has weights of {tensor.dtype}: load the model without quantisation"
    if tensor.shape != size:
        return f"has weights of shape {tuple(tensor.shape)}, its configuration says {size}: correct either"
    return None


def _fused(policy: Any, shape: _DecoderShape) -> Iterator[tuple[str, Tensor]]:
    """The fused tensors of a policy, one at a time."""
    decoder = policy.decoder.model.decoder
    scale = shape.head_dim**-0.5

    def weight_of(layer: Any) -> Tensor:
        return effective_weight(layer, wide=True)

    yield "embedding", torch.cat([weight_of(table) for table in decoder.embed_tokens])
    yield "positions", decoder.embed_positions.weights[: shape.max_positions]
    yield "norm", weight_of(decoder.layer_norm)
    yield "norm_bias", decoder.layer_norm.bias
    yield "heads", torch.cat([weight_of(head) for head in policy.decoder.lm_heads]).T
    if shape.text_size is not None:
        yield "text.weight", weight_of(policy.enc_to_dec_proj).T
        yield "text.bias", policy.enc_to_dec_proj.bias
        if shape.knots:
            yield "text.shift", getattr(policy, SHIFT).rows()
    for index, layer in enumerate(decoder.layers):
        own, cross = layer.self_attn, layer.encoder_attn
        yield f"layers.{index}.self_norm", weight_of(layer.self_attn_layer_norm)
        yield f"layers.{index}.self_norm_bias", layer.self_attn_layer_norm.bias
        queries, keys, values = map(weight_of, (own.q_proj, own.k_proj, own.v_proj))
        # Head by head, so that the queries of a product's rows and heads lie evenly spaced.
        by_head = [m.view(shape.num_heads, -1, shape.hidden_size) for m in (queries * scale, keys, values)]
        yield f"layers.{index}.qkv", torch.stack(by_head, dim=1).flatten(0, 2).T
        yield f"layers.{index}.self_out", weight_of(own.out_proj).T
        yield f"layers.{index}.cross_norm", weight_of(layer.encoder_attn_layer_norm)
        yield f"layers.{index}.cross_norm_bias", layer.encoder_attn_layer_norm.bias
        yield f"layers.{index}.cross_query", weight_of(cross.q_proj).T * scale
        keys_values = torch.cat([weight_of(cross.k_proj), weight_of(cross.v_proj)])
        yield f"layers.{index}.cross_key_value", keys_values.T
        yield f"layers.{index}.cross_out", weight_of(cross.out_proj).T
        yield f"layers.{index}.final_norm", weight_of(layer.final_layer_norm)
        yield f"layers.{index}.final_norm_bias", layer.final_layer_norm.bias
        yield f"layers.{index}.fc1", weight_of(layer.fc1).T
        yield f"layers.{index}.fc2", weight_of(layer.fc2).T


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather the weights of an FSDP2 model while the context lasts; others are whole already."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
