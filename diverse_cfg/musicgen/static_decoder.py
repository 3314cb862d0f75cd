"""MusicGen's decoder for one step at a time, on static buffers: nothing is allocated by length, nothing is concatenated.

`RolloutWeights` is a snapshot of the decoder, fused for sampling: query, key and value in one matrix, the K heads in
one, the K embedding tables in one, LoRA added in, the attention scale folded into the queries, matrices stored as the
right operand of a product. The model itself is only read. `StaticDecoder` holds the caches of one batch.

    rows of x:   0 … N−1     the clips under their prompt, with cross-attention
                 N … 2N−1    the same clips under the null prompt, if guided: no cross-attention (it would add exactly 0)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from diverse_cfg.functional.codebooks import codebook_delays
from diverse_cfg.musicgen.policy import effective_weight, unwrap
from diverse_cfg.types import TextCondition

# They all compute softmax attention, which is what the loop computes; another name may mean another function.
SUPPORTED_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

# The tensors that take the requested dtype; norms, embeddings and the text projection stay in float32.
_MATRICES = frozenset(
    {"heads", "qkv", "self_out", "cross_query", "cross_key_value", "cross_out", "fc1", "fc2"}
)


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
    """One decoder layer; matrices [in, out]."""

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
        self.loops: dict = {}
        """Loops kept by `rollout` for their CUDA graphs, which stay valid as long as these tensors do."""
        num_layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
        self.layers = [
            LayerWeights(
                **{name: tensors[f"layers.{index}.{name}"] for name in LayerWeights.__dataclass_fields__}
            )
            for index in range(num_layers)
        ]

    @classmethod
    @torch.no_grad()
    def from_model(cls, model: nn.Module, dtype: torch.dtype | None = None, compiled: bool = False) -> Self:
        """Snapshot the decoder of a policy, active LoRA adapters added.

        Args:
            model: the policy, also inside a `PeftModel`; it is not modified.
            dtype: of the matrices, the model's by default. Norms, residual stream and sampling stay in float32 (or the
                model's, if wider), so that bfloat16 costs little accuracy.
            compiled: let `torch.compile` fuse the small operations of a layer: a GPU saves launches, at the cost of a
                compilation per shape and context bucket. Needs a compiler (triton, or C++ on a CPU).

        Raises:
            ValueError: an attention implementation or an adapter whose effect is not known.
        """
        policy = unwrap(model)
        config = policy.decoder.config
        attention = config._attn_implementation
        if attention not in SUPPORTED_ATTENTION:
            raise ValueError(
                f"attn_implementation={attention!r} may compute another attention than the rollout does: load the model "
                f"with one of {', '.join(SUPPORTED_ATTENTION)}, or sample with rollout_backend='transformers'"
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
        dtype = dtype or policy.decoder.dtype
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {}
        for name, tensor in _fused(policy, shape):
            # Filled by copy, so that no tensor shares memory with the model, and `.T` becomes contiguous.
            matrix = name.split(".")[-1] in _MATRICES
            tensors[name] = torch.empty(tensor.shape, dtype=dtype if matrix else wide, device=tensor.device)
            tensors[name].copy_(tensor)
        return cls(shape, tensors, compiled)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Copy the policy's present weights into the same tensors, so that captured CUDA graphs stay valid."""
        for name, tensor in _fused(unwrap(model), self.shape):
            self.tensors[name].copy_(tensor)

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


class StaticDecoder:
    """The decoder over one batch of clips: caches of fixed size, one step per call.

    Args:
        weights: the snapshot to run.
        num_clips: N.
        num_steps: S, the length of the caches.
        condition: cross-attended rows: N (prompts), or 2·N when the second half has text too (a negative prompt).
        guided: decode N further rows without the prompt.
    """

    def __init__(
        self, weights: RolloutWeights, num_clips: int, num_steps: int, condition: TextCondition, guided: bool
    ) -> None:
        shape = weights.shape
        self.weights = weights
        self.num_clips = num_clips
        self.num_rows = 2 * num_clips if guided else num_clips
        self.num_steps = num_steps
        # A CPU has no fast half-precision attention; its matrix products are what bfloat16 speeds up.
        cpu = weights.device.type == "cpu"
        self.cache_dtype = weights.tensors["norm"].dtype if cpu else weights.dtype
        self.activation = ACT2FN[shape.activation]
        self._layer = (
            torch.compile(self._decoder_layer, dynamic=False) if weights.compiled else self._decoder_layer
        )
        self.offsets = torch.arange(shape.num_codebooks, device=weights.device) * (shape.vocab_size + 1)
        self.cache = [
            torch.zeros(
                (2, self.num_rows, shape.num_heads, num_steps, shape.head_dim),
                dtype=self.cache_dtype,
                device=weights.device,
            )
            for _ in weights.layers
        ]
        self.cross_bias, self.cross = self._cross_attention_inputs(condition)

    def reset(self, condition: TextCondition) -> None:
        """Start another batch of the same shape on the same buffers."""
        bias, cross = self._cross_attention_inputs(condition)
        self.cross_bias.copy_(bias)
        for buffer, values in zip(self.cross, cross, strict=True):
            buffer.copy_(values)
        for (
            cache
        ) in self.cache:  # a masked cell still multiplies by 0, and 0 · NaN of a failed run would spread
            cache.zero_()

    def step(self, ids: Tensor, position: Tensor, length: int, bias: Tensor | None = None) -> Tensor:
        """Logits of one step.

        Args:
            ids: input ids of this step [N, K].
            position: this step's index [1], on the device.
            length: how many cached positions to attend to, this step's included.
            bias: what to add to the attention scores [length], −inf for positions still to come; None if all are there.

        Returns:
            Logits [N or 2·N, K, V] in the matrices' dtype.
        """
        tensors, shape = self.weights.tensors, self.weights.shape
        x = F.embedding(ids + self.offsets, tensors["embedding"]).sum(1)
        x = x + tensors["positions"].index_select(0, position)
        if self.num_rows > self.num_clips:
            x = x.repeat(2, 1)
        for layer, cache, cross in zip(self.weights.layers, self.cache, self.cross, strict=True):
            x = self._layer(x, layer, cache, cross, position, length, bias)
        h = self._norm(x, tensors["norm"], tensors["norm_bias"])
        return self._product(h, tensors["heads"]).view(self.num_rows, shape.num_codebooks, shape.vocab_size)

    def _decoder_layer(
        self,
        x: Tensor,
        layer: LayerWeights,
        cache: Tensor,
        cross: Tensor,
        position: Tensor,
        length: int,
        bias: Tensor | None,
    ) -> Tensor:
        h = self._norm(x, layer.self_norm, layer.self_norm_bias)
        x = self._add(x, self._self_attention(h, layer, cache, position, length, bias), layer.self_out)
        # Rows without text skip the next block: they stay as they are in x.
        num_cross = self.cross_bias.shape[0]
        texted = x[:num_cross]
        h = self._norm(texted, layer.cross_norm, layer.cross_norm_bias)
        query = self._product(h, layer.cross_query).to(self.cache_dtype)
        query = query.view(num_cross, self.weights.shape.num_heads, 1, -1)
        attended = _attend(query, cross[0], cross[1], self.cross_bias)
        self._add(texted, attended.reshape(num_cross, -1), layer.cross_out)
        h = self._norm(x, layer.final_norm, layer.final_norm_bias)
        return self._add(x, self.activation(self._product(h, layer.fc1)), layer.fc2)

    def _self_attention(
        self,
        h: Tensor,
        layer: LayerWeights,
        cache: Tensor,
        position: Tensor,
        length: int,
        bias: Tensor | None,
    ) -> Tensor:
        shape = self.weights.shape
        qkv = self._product(h, layer.qkv).to(self.cache_dtype)
        qkv = qkv.view(self.num_rows, 3, shape.num_heads, 1, shape.head_dim)
        cache.index_copy_(3, position, qkv[:, 1:].transpose(0, 1))
        keys, values = cache[:, :, :, :length].unbind(0)
        return _attend(qkv[:, 0], keys, values, bias).reshape(self.num_rows, -1)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.weights.shape.layer_norm_eps)

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return torch.mm(x.to(matrix.dtype), matrix)

    def _add(self, x: Tensor, update: Tensor, matrix: Tensor) -> Tensor:
        """x += update @ matrix, in place: in one call where the dtypes agree."""
        if x.dtype == matrix.dtype:
            return x.addmm_(update.to(matrix.dtype), matrix)
        return x.add_(self._product(update, matrix))

    def _cross_attention_inputs(self, condition: TextCondition) -> tuple[Tensor, list[Tensor]]:
        """Bias over the text [B, 1, 1, Lt], and for each layer keys and values of the text [2, B, H, Lt, D / H]."""
        shape = self.weights.shape
        text = self.weights.project_text(condition)
        mask = condition.attention_mask.to(self.weights.device)
        # The smallest number and not −inf: a row that is masked throughout must give 0 (its values are 0), not NaN.
        bias = torch.zeros(mask.shape, dtype=self.cache_dtype, device=self.weights.device)
        bias.masked_fill_(mask == 0, torch.finfo(self.cache_dtype).min)
        flat = text.flatten(0, 1)
        cross = []
        for layer in self.weights.layers:
            keys_values = self._product(flat, layer.cross_key_value).to(self.cache_dtype)
            keys_values = keys_values.view(*text.shape[:2], 2, shape.num_heads, shape.head_dim)
            cross.append(keys_values.permute(2, 0, 3, 1, 4).contiguous())
        return bias[:, None, None], cross


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one (already scaled) query per row and head [R, H, 1, d] over keys and values [R, H, L, d]."""
    if query.device.type == "cuda":
        mask = None if bias is None else bias.expand(*query.shape[:2], 1, keys.shape[2])
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
    # For a single query the batched products beat the fused kernel on a CPU.
    rows, heads = query.shape[:2]
    scores = torch.bmm(query.reshape(rows * heads, 1, -1), keys.flatten(0, 1).transpose(1, 2))
    if bias is not None:
        scores = (scores.view(rows, heads, 1, -1) + bias).view(rows * heads, 1, -1)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(rows, heads, 1, -1)


def _fused(policy: nn.Module, shape: DecoderShape) -> Iterator[tuple[str, Tensor]]:
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
        queries = effective_weight(own.q_proj) * scale
        yield (
            f"layers.{index}.qkv",
            torch.cat([queries, effective_weight(own.k_proj), effective_weight(own.v_proj)]).T,
        )
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
