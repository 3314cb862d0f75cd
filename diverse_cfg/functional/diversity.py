"""Diversity of the generations of one prompt: distances, reward, Vendi score; and advantages, of it and of others.

    D(θ) = E_x E_{y1, y2 ~ π_θ(·|x)} [ 1 − cos(E(y1), E(y2)) ]                          (arXiv 2410.06084)

`prefix_baseline` holds the variance reducer that goes with it.
"""

import torch
from torch import Tensor

from diverse_cfg.functional._checks import promote, require_ndim


def unit_embeddings(embeddings: Tensor) -> Tensor:
    """Embeddings divided by their norm, in float32 or float64.

    Args:
        embeddings: [..., D].

    Returns:
        Unit vectors [..., D].

    Raises:
        ValueError: an embedding is not finite, or is zero and so has no direction; the first one is named.
    """
    (embeddings,) = promote(embeddings)
    norms = embeddings.norm(dim=-1, keepdim=True)
    usable = torch.isfinite(norms) & (norms > 0)
    if not bool(usable.all()):
        index = tuple((~usable.squeeze(-1)).nonzero()[0].tolist())
        raise ValueError(
            f"embedding {index} of shape {tuple(embeddings.shape)} has norm {norms[index].item()}: a cosine "
            "needs a finite, non-zero embedding (is the clip silent or broken?)"
        )
    return embeddings / norms


def pairwise_cosine_distance(embeddings: Tensor) -> Tensor:
    """Cosine distances inside each prompt's group.

        d[p, i, j] = 1 − cos(e_pi, e_pj)                                              (arXiv 2410.06084)

    Args:
        embeddings: [P, G, D].

    Returns:
        Distances in [0, 2], shape [P, G, G], symmetric, exactly 0 on the diagonal.

    Raises:
        ValueError: wrong number of dimensions, a zero or non-finite embedding.
    """
    require_ndim("embeddings", embeddings, "P G D")
    unit = unit_embeddings(embeddings)
    distances = (1 - unit @ unit.mT).clamp(min=0, max=2)
    itself = torch.eye(distances.shape[-1], dtype=torch.bool, device=distances.device)
    return distances.masked_fill(itself, 0)


def diversity_reward(embeddings: Tensor) -> Tensor:
    """Mean cosine distance of each generation to the others of its prompt.

        r_i = 1/(G − 1) · Σ_{j≠i} (1 − cos(e_i, e_j))                                 (arXiv 2410.06084)

    Its mean over the group is the unbiased estimate of D.

    Args:
        embeddings: [P, G, D].

    Returns:
        Rewards in [0, 2], shape [P, G].

    Raises:
        ValueError: G < 2, wrong number of dimensions, a zero or non-finite embedding.
    """
    require_ndim("embeddings", embeddings, "P G D")
    num_generations = embeddings.shape[1]
    if num_generations < 2:
        raise ValueError(f"a distance needs num_generations >= 2, got {num_generations}")
    return pairwise_cosine_distance(embeddings).sum(dim=-1) / (num_generations - 1)


def diversity_advantages(rewards: Tensor) -> Tensor:
    """Advantages that make REINFORCE an unbiased estimate of the diversity's gradient.

        A_i = 2 · (r_i − b_i) = 2·G/(G − 2) · (r_i − mean_j r_j)

    By symmetry of the pair, ∇D = 2·E[ d(y1, y2) · ∇log π(y1) ], hence the factor 2. The baseline b_i must not
    depend on y_i. Every r_j contains the pair (i, j), so the usual leave-one-out mean of the other rewards
    does depend on it, and cancels part of the signal: it gives (G − 2)/(G − 1) of ∇D, nothing at all for
    G = 2. The mean over the pairs *without* i is free of it: with Σ_{j<k} d_jk = G(G−1)/2 · mean r, of which
    (G−1)·r_i belong to i,

        b_i = [G(G−1)/2 · mean r − (G−1)·r_i] / [(G−1)(G−2)/2] = (G · mean r − 2·r_i) / (G − 2).

    The mean over the group of A_i·∇log π(y_i) is then ∇D in expectation, for every G ≥ 3. Do not divide by a
    standard deviation: that changes the objective (and, at G = 4, its size by several times).

    Args:
        rewards: r from `diversity_reward` [P, G].

    Returns:
        Advantages [P, G], which sum to zero over a group.

    Raises:
        ValueError: wrong number of dimensions, or G < 3: two generations share one distance, so nothing is
            left.
    """
    require_ndim("rewards", rewards, "P G")
    num_generations = rewards.shape[1]
    if num_generations < 3:
        raise ValueError(
            f"diversity needs num_generations >= 3, got {num_generations}: the baseline of a generation is "
            "the distance among the others. Raise num_generations, or set diversity_coef=0"
        )
    (rewards,) = promote(rewards)
    return 2 * num_generations / (num_generations - 2) * (rewards - rewards.mean(dim=1, keepdim=True))


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Advantages against the mean reward of the other generations of the prompt (RLOO).

        A_i = r_i − 1/(G − 1) · Σ_{j≠i} r_j = G/(G − 1) · (r_i − mean_j r_j)            (arXiv 2402.14740)

    For rewards that depend on one generation alone. The diversity reward depends on pairs and has advantages
    of its own.

    Args:
        rewards: [P, G].

    Returns:
        Advantages [P, G], which sum to zero over a group.

    Raises:
        ValueError: wrong number of dimensions, or G < 2.
    """
    require_ndim("rewards", rewards, "P G")
    num_generations = rewards.shape[1]
    if num_generations < 2:
        raise ValueError(f"a leave-one-out baseline needs num_generations >= 2, got {num_generations}")
    (rewards,) = promote(rewards)
    return num_generations / (num_generations - 1) * (rewards - rewards.mean(dim=1, keepdim=True))


def farthest_points(distances: Tensor, count: int) -> list[int]:
    """Points that lie far from each other: the first one, then again and again the one farthest from those chosen.

        i_1 = 0,  i_{n+1} = argmax_i min_{m ≤ n} d(i, i_m)

    Their smallest distance is at least half of the best that is possible (Gonzalez, 1985).

    Args:
        distances: [M, M], symmetric.
        count: how many, at most M.

    Returns:
        Indices in the order in which they were chosen; of equally far ones the first.
    """
    chosen, nearest = [0], distances[0].clone()
    while len(chosen) < count:
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances[chosen[-1]])
    return chosen


def vendi_score(embeddings: Tensor) -> Tensor:
    """Vendi score: the effective number of different generations in a group.

        VS = exp( − Σ_i λ_i log λ_i ),  λ = eigenvalues of K / G,  K_ij = cos(e_i, e_j)   (arXiv 2210.02410)

    G identical embeddings score 1, G orthogonal ones score G. It grows with G: compare at one G only.

    Args:
        embeddings: [..., G, D].

    Returns:
        Scores [...], between 1 and G.

    Raises:
        ValueError: fewer than two dimensions, no generations, a zero or non-finite embedding.
    """
    if embeddings.ndim < 2 or embeddings.shape[-2] < 1:
        raise ValueError(f"embeddings must have shape [..., G, D] with G >= 1, got {tuple(embeddings.shape)}")
    unit = unit_embeddings(embeddings)
    # float64: rounding makes tiny eigenvalues, and x·log x is steep at zero.
    wide = unit.double()
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.mT / embeddings.shape[-2]).clamp(min=0)
    return torch.special.entr(eigenvalues).sum(dim=-1).exp().to(unit.dtype)
