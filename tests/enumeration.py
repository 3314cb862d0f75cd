"""Exact gradients by listing every sequence, with plain transformers and none of our code.

The policy is a MusicGen with V = 2 codes, K = 2 codebooks and T frames: V^(K·T) = 4 sequences for T = 1, 16
for T = 2. The second codebook is decoded one step late, so even T = 1 has a code that depends on another.

    Q = − Σ_y p(y) · Σ_kt KL_kt(y)      with p(y) held fixed: the sampling is stopped, as in GKD
    D = Σ_{y, z} p(y) · p(z) · (1 − cos(e_y, e_z))
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

PROMPT = "a calm piano song"
CODES = 2
CODEBOOKS = 2


def all_sequences(num_frames: int) -> Tensor:
    """Every clip, int64 [Y, K, T]."""
    values = list(itertools.product(range(CODES), repeat=CODEBOOKS * num_frames))
    return torch.tensor(values).view(-1, CODEBOOKS, num_frames)


def sequence_index(codes: Tensor) -> Tensor:
    """Position of each clip [N, K, T] in `all_sequences`."""
    flat = codes.flatten(1)
    weights = torch.tensor([CODES**power for power in reversed(range(flat.shape[1]))])
    return (flat * weights).sum(dim=1)


def sequence_embeddings(num_frames: int, dim: int = 3, seed: int = 5) -> Tensor:
    """A fixed embedding of every clip [Y, dim]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CODES ** (CODEBOOKS * num_frames), dim, generator=generator, dtype=torch.float64)


class TableEmbedder:
    """Looks a clip's embedding up; beginnings have embeddings of their own."""

    name = "table"
    reads = "codes"
    sampling_rate = 3200

    def embed(self, inputs: Tensor, sampling_rate: int | None = None) -> Tensor:
        return sequence_embeddings(inputs.shape[2])[sequence_index(inputs)]


def step_logps(model, text: Tensor, mask: Tensor, num_frames: int) -> Tensor:
    """Log-distributions of every cell of every sequence, by transformers' own forward [Y, K, T, V]."""
    sequences = all_sequences(num_frames)
    rows, pad = len(sequences), model.config.decoder.vocab_size
    steps = num_frames + CODEBOOKS - 1
    inputs = torch.full((rows, CODEBOOKS, steps), pad)
    for codebook in range(CODEBOOKS):
        for frame in range(num_frames):
            position = 1 + frame + codebook
            if position < steps:
                inputs[:, codebook, position] = sequences[:, codebook, frame]
    logits = model(
        encoder_outputs=BaseModelOutput(text.expand(rows, -1, -1)),
        attention_mask=mask.expand(rows, -1),
        decoder_input_ids=inputs.view(rows * CODEBOOKS, steps),
        use_cache=False,
    ).logits.view(rows, CODEBOOKS, steps, -1)
    cells = [logits[:, codebook, codebook : codebook + num_frames] for codebook in range(CODEBOOKS)]
    return torch.stack(cells, dim=1)


def exact(student, teacher, tokenizer, num_frames: int, guidance_scale: float = 3.0) -> dict[str, Tensor]:
    """p(y) [Y] (differentiable), and scalars with a graph: Q with the sampling stopped, Q in full, D, and D with
    the second codebook held fixed."""
    tokens = tokenizer([PROMPT], return_tensors="pt")
    with torch.no_grad():
        text = student.text_encoder(**tokens).last_hidden_state
        cond = step_logps(teacher, text, tokens.attention_mask, num_frames)
        nothing = torch.zeros_like(text), torch.zeros_like(tokens.attention_mask)
        null = step_logps(teacher, *nothing, num_frames)
        teacher_logps = (null + guidance_scale * (cond - null)).log_softmax(dim=-1)
    logps = step_logps(student, text, tokens.attention_mask, num_frames).log_softmax(dim=-1)
    sequences = all_sequences(num_frames)
    chosen = logps.gather(-1, sequences[..., None])[..., 0].sum(dim=2)
    probability = chosen.sum(dim=1).exp()
    leading = (chosen[:, 0] + chosen[:, 1].detach()).exp()
    divergence = (logps.exp() * (logps - teacher_logps)).sum(dim=(1, 2, 3))
    unit = torch.nn.functional.normalize(sequence_embeddings(num_frames), dim=1)
    distances = 1 - unit @ unit.T
    return {
        "probability": probability,
        "Q": -(probability.detach() * divergence).sum(),
        "Q_full": -(probability * divergence).sum(),
        "D": probability @ distances @ probability,
        "D_leading": leading @ distances @ leading,
    }


def groups(probability: Tensor, size: int) -> Iterator[tuple[list[int], float]]:
    """Every group of `size` clips up to order, with its probability."""
    p = probability.tolist()
    for group in itertools.combinations_with_replacement(range(len(p)), size):
        counts = Counter(group)
        orders = math.factorial(size)
        for count in counts.values():
            orders //= math.factorial(count)
        yield list(group), orders * math.prod(p[index] ** count for index, count in counts.items())


def gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """Gradient over all parameters as one vector; zeros where nothing flows."""
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)]
    return torch.cat([part.flatten() for part in flat])
