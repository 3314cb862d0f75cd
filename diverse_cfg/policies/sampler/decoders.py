"""MusicGen's decoder one step at a time, on buffers of fixed size: nothing is concatenated, keys and values
of the text are computed once.

    rows of x    0 … N−1     the clips under their prompt, with cross-attention
                 N … 2N−1    when guided, the same clips under the null prompt: no cross-attention, which
                             would add exactly 0 (a negative prompt has it, of course)

`EagerDecoder` is for CPUs: few calls, products written straight into buffers whose views were made
beforehand, and attention over just the steps that exist. `StaticDecoder` is for GPUs: the step's index is a
tensor and the context is masked, so that a CUDA graph can replay it. Both give the logits of stock MusicGen.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from diverse_cfg.functional.guidance import guided_logits, total_variation
from diverse_cfg.policies.sampler.weights import LayerWeights, RolloutWeights, activated_product, product
from diverse_cfg.types import TextCondition

# The softmax of a CPU is ten times as slow for rows that do not fill a vector register.
_LEAST_TOKENS = 16


class _Decoder:
    """What both decoders have in common.

    Args:
        weights: the snapshot to run.
        num_clips: N.
        num_steps: S, the length of the caches.
        condition: cross-attended rows: N (prompts), or 2·N when the second half has text too (a negative
            prompt).
        guidance: γ, or a tensor [S, K] of every step and codebook; None decodes no null rows beside the
            prompts'.
        adaptive: (ε, n) of `adaptive_guidance`, and which cells of a step hold codes [S, K]; None guides to the end.

    Attributes:
        null_rows: computed so far for each clip [N], where guidance is adaptive.
    """

    wide_cache: ClassVar[bool]
    """Whether keys and values have the residual stream's precision, instead of the matrices'."""

    def __init__(
        self,
        weights: RolloutWeights,
        num_clips: int,
        num_steps: int,
        condition: TextCondition,
        guidance: float | Tensor | None,
        adaptive: tuple[float, int, Tensor] | None = None,
    ) -> None:
        shape = weights.shape
        self.weights = weights
        self.cache_dtype = weights.tensors["norm"].dtype if self.wide_cache else weights.dtype
        self.num_clips = num_clips
        self.guidance = guidance
        self.adaptive = adaptive
        self.paired = torch.arange(num_clips, device=weights.device)  # the clips of the null rows
        self.agreed, self.null_rows = (torch.zeros_like(self.paired) for _ in range(2))
        self.num_rows = num_clips if guidance is None else 2 * num_clips
        self.num_texts = len(condition)
        self.activation = ACT2FN[shape.activation]
        self.offsets = torch.arange(shape.num_codebooks, device=weights.device) * (shape.vocab_size + 1)
        size = (2, self.num_rows, shape.num_heads, num_steps, shape.head_dim)
        self.cache = [
            torch.empty(size, dtype=self.cache_dtype, device=weights.device) for _ in weights.layers
        ]
        self._prepare(condition)

    def _prepare(self, condition: TextCondition) -> None:
        """Make what the steps read."""
        raise NotImplementedError

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.weights.shape.layer_norm_eps)

    def _add(self, x: Tensor, update: Tensor, matrix: Tensor) -> Tensor:
        """x += update @ matrix, in place; in one call where that can be."""
        if x.dtype == matrix.dtype and not matrix.is_mkldnn:
            return x.addmm_(update, matrix)
        return x.add_(product(update, matrix))

    def _logits(self, x: Tensor, step: int | Tensor) -> Tensor:
        """Logits [N, K, V] from the last layer.

        The heads are linear, so that one γ comes before them, at half the work; codebooks of one step belong to
        different frames, so that a schedule comes after.
        """
        tensors, shape = self.weights.tensors, self.weights.shape
        h = self._norm(x, tensors["norm"], tensors["norm_bias"])
        scale = _row(self.guidance, step) if isinstance(self.guidance, Tensor) else self.guidance
        scheduled = isinstance(scale, Tensor)
        if self.adaptive is not None and scale is not None:
            return self._adaptive_logits(h, step, scale)
        if scale is not None and not scheduled:
            h = guided_logits(*h.chunk(2), scale)
        logits = product(h, tensors["heads"]).view(-1, shape.num_codebooks, shape.vocab_size)
        return guided_logits(*logits.chunk(2), scale) if scheduled else logits

    def _adaptive_logits(self, h: Tensor, step: int | Tensor, scale: float | Tensor) -> Tensor:
        """Logits [N, K, V], guided in the clips that have not agreed before; see `functional.guidance`."""
        assert self.adaptive is not None
        (threshold, steps, cells), shape = self.adaptive, self.weights.shape
        logits = (
            product(h, self.weights.tensors["heads"]).view(-1, shape.num_codebooks, shape.vocab_size).float()
        )
        cond, null = logits[: self.num_clips], logits[self.num_clips :]
        paired, agreed = cond.index_select(0, self.paired), self.agreed.index_select(0, self.paired)
        open_cells = _row(cells, step)
        variation = (total_variation(paired, null) * open_cells).sum(-1) / open_cells.sum()
        done = agreed >= steps
        guided = torch.where(done[:, None, None], paired, guided_logits(paired, null, scale))
        agreed = torch.where(done, agreed, torch.where(variation < threshold, agreed + 1, 0))
        self.agreed.index_copy_(0, self.paired, agreed)
        self.null_rows.index_add_(0, self.paired, torch.ones_like(agreed))
        return cond.index_copy(0, self.paired, guided)

    def _text(self, condition: TextCondition) -> tuple[Tensor, list[Tensor]]:
        """Bias over the text [B, 1, 1, Lt], and for each layer its keys and values [2, B, H, Lt, D / H]."""
        shape = self.weights.shape
        text = self.weights.project_text(condition)
        mask = condition.attention_mask.to(self.weights.device)
        # Finite, not −inf: a row masked throughout must give 0 (as its values are), not NaN. And with room to
        # spare, since kernels multiply it (by log2 e).
        bias = torch.zeros(mask.shape, dtype=self.cache_dtype, device=self.weights.device)
        bias.masked_fill_(mask == 0, torch.finfo(self.cache_dtype).min / 4)
        flat = text.flatten(0, 1)
        keys_values = []
        for layer in self.weights.layers:
            both = product(flat, layer.cross_key_value).to(self.cache_dtype)
            both = both.view(*text.shape[:2], 2, shape.num_heads, shape.head_dim)
            keys_values.append(both.permute(2, 0, 3, 1, 4).contiguous())
        return bias[:, None, None], keys_values


class EagerDecoder(_Decoder):
    """The decoder on a CPU. One batch, then a new object; see `_Decoder`."""

    # A CPU has no fast half-precision attention; its matrix products are what bfloat16 speeds up.
    wide_cache = True

    def _prepare(self, condition: TextCondition) -> None:
        texts, heads = self.num_texts, self.weights.shape.num_heads
        self.positions = self.weights.tensors["positions"].unbind(0)
        bias, keys_values = self._text(condition.pad(_LEAST_TOKENS))
        self.text_bias = bias.expand(texts, heads, 1, -1).flatten(0, 1).contiguous()
        self.text_keys = [both[0].flatten(0, 1).transpose(1, 2) for both in keys_values]
        self.text_values = [both[1].flatten(0, 1) for both in keys_values]
        self._lay_out()

    def _lay_out(self) -> None:
        """Make the buffers and views of as many rows as there are."""
        rows, texts, shape = self.num_rows, self.num_texts, self.weights.shape
        heads, width, size = shape.num_heads, shape.head_dim, shape.hidden_size
        caches = [cache[:, :rows] for cache in self.cache]

        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=self.cache_dtype, device=self.weights.device)

        # Per layer: where each step's keys and values go, all keys transposed, all values.
        self.slots = [cache.flatten(1, 2).unbind(2) for cache in caches]
        self.keys = [cache[0].flatten(0, 1).transpose(1, 2) for cache in caches]
        self.values = [cache[1].flatten(0, 1) for cache in caches]
        self.by_head = (rows * heads, 3, width)
        self.attended = empty(rows * heads, 1, width)
        self.update = self.attended.view(rows, size)
        self.text_query = empty(texts, size)
        self.text_queries = self.text_query.view(texts * heads, 1, width)
        self.text_attended = empty(texts * heads, 1, width)
        self.text_update = self.text_attended.view(texts, size)

    def drop_agreed(self, steps: int) -> None:
        """Compute no more null rows for the clips that have agreed for so many steps."""
        kept = (self.agreed[self.paired] < steps).nonzero()[:, 0]
        if len(kept) == len(self.paired):
            return
        first, heads = self.num_clips, self.weights.shape.num_heads
        for cache in self.cache:
            cache[:, first : first + len(kept)] = cache[:, first + kept]
        self.paired, self.num_rows = self.paired[kept], first + len(kept)
        if self.num_texts > first:
            texts = torch.cat([torch.arange(first), first + kept])
            self.num_texts = len(texts)
            self.text_bias, *others = (
                part.unflatten(0, (-1, heads))[texts].flatten(0, 1)
                for part in (self.text_bias, *self.text_keys, *self.text_values)
            )
            self.text_keys, self.text_values = others[: len(others) // 2], others[len(others) // 2 :]
        self._lay_out()

    def step(self, ids: Tensor, step: int) -> Tensor:
        """Logits of one step; steps come in order.

        Args:
            ids: input ids [N, K].
            step: index of this step.

        Returns:
            Guided logits [N, K, V] in the matrices' dtype.
        """
        tensors = self.weights.tensors
        x = F.embedding_bag(ids + self.offsets, tensors["embedding"], mode="sum").add_(self.positions[step])
        if self.num_rows > self.num_clips:
            x = x.repeat(2, 1) if self.adaptive is None else torch.cat([x, x[self.paired]])
        texted = x[: self.num_texts]  # the rows with cross-attention; the same memory
        for index, layer in enumerate(self.weights.layers):
            h = self._norm(x, layer.self_norm, layer.self_norm_bias)
            qkv = product(h, layer.qkv).view(self.by_head)
            self.slots[index][step].copy_(qkv[:, 1:].transpose(0, 1))
            queries = qkv[:, :1].to(self.cache_dtype)
            scores = torch.bmm(queries, self.keys[index][:, :, : step + 1]).softmax(-1)
            torch.bmm(scores, self.values[index][:, : step + 1], out=self.attended)
            self._add(x, self.update, layer.self_out)

            h = self._norm(texted, layer.cross_norm, layer.cross_norm_bias)
            self.text_query.copy_(product(h, layer.cross_query))
            scores = torch.baddbmm(self.text_bias, self.text_queries, self.text_keys[index]).softmax(-1)
            torch.bmm(scores, self.text_values[index], out=self.text_attended)
            self._add(texted, self.text_update, layer.cross_out)

            h = self._norm(x, layer.final_norm, layer.final_norm_bias)
            self._add(x, activated_product(h, layer.fc1, self.activation), layer.fc2)
        logits = self._logits(x, step)
        if self.adaptive is not None:
            self.drop_agreed(self.adaptive[1])
        return logits


class StaticDecoder(_Decoder):
    """The decoder on a GPU; see `_Decoder`. May be reset for another batch of the same shape."""

    # Attention kernels want the matrices' half precision, where there is one.
    wide_cache = False

    def _prepare(self, condition: TextCondition) -> None:
        self._clear()
        self.text_bias, self.text_keys_values = self._text(condition)

    def reset(self, condition: TextCondition) -> None:
        """Start another batch of the same shape on the same buffers."""
        bias, keys_values = self._text(condition)
        self.text_bias.copy_(bias)
        for buffer, values in zip(self.text_keys_values, keys_values, strict=True):
            buffer.copy_(values)
        self._clear()

    def _clear(self) -> None:
        for cache in self.cache:  # masked cells still multiply by 0, and 0 · NaN of a failed run would spread
            cache.zero_()

    def step(self, ids: Tensor, position: Tensor, length: int, bias: Tensor) -> Tensor:
        """Logits of one step.

        Args:
            ids: input ids [N, K].
            position: index of this step [1].
            length: cached positions to attend to, this step's included.
            bias: added to the attention scores [length]: 0, and −inf for positions still to come.

        Returns:
            Guided logits [N, K, V] in the matrices' dtype.
        """
        tensors = self.weights.tensors
        x = F.embedding(ids + self.offsets, tensors["embedding"]).sum(1)
        x = x + tensors["positions"].index_select(0, position)
        if self.num_rows > self.num_clips:
            x = x.repeat(2, 1)
        layers = zip(self.weights.layers, self.cache, self.text_keys_values, strict=True)
        for layer, cache, text in layers:
            x = self._decoder_layer(x, layer, cache, text, position, length, bias)
        return self._logits(x, position)

    def _decoder_layer(
        self,
        x: Tensor,
        layer: LayerWeights,
        cache: Tensor,
        text: Tensor,
        position: Tensor,
        length: int,
        bias: Tensor,
    ) -> Tensor:
        heads, width = self.weights.shape.num_heads, self.weights.shape.head_dim
        h = self._norm(x, layer.self_norm, layer.self_norm_bias)
        qkv = product(h, layer.qkv).view(self.num_rows, heads, 3, 1, width)
        cache.index_copy_(3, position, qkv[:, :, 1:].permute(2, 0, 1, 3, 4))
        keys, values = cache[:, :, :, :length].unbind(0)
        mask = bias.expand(self.num_rows, heads, 1, length)
        attended = F.scaled_dot_product_attention(qkv[:, :, 0], keys, values, attn_mask=mask, scale=1.0)
        x = self._add(x, attended.reshape(self.num_rows, -1), layer.self_out)

        texted = x[: self.num_texts]  # the rows with cross-attention; the same memory
        h = self._norm(texted, layer.cross_norm, layer.cross_norm_bias)
        query = product(h, layer.cross_query).view(self.num_texts, heads, 1, width)
        mask = self.text_bias.expand(-1, heads, -1, -1)
        attended = F.scaled_dot_product_attention(query, text[0], text[1], attn_mask=mask, scale=1.0)
        self._add(texted, attended.reshape(self.num_texts, -1), layer.cross_out)

        h = self._norm(x, layer.final_norm, layer.final_norm_bias)
        return self._add(x, activated_product(h, layer.fc1, self.activation), layer.fc2)


def _row(table: Tensor, step: int | Tensor) -> Tensor:
    """What a table [S, K] says of a step [K]."""
    return table[step] if isinstance(step, int) else table.index_select(0, step)[0]
