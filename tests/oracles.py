"""Slow, separate answers to what `diverse_cfg.functional` computes: NumPy float64, plain loops.

Each function follows the definition in the paper rather than the formula in our code: pairs are enumerated,
sums are written out, rectangles are counted. Nothing here may import `diverse_cfg` or torch.
"""

import itertools
import math

import numpy as np
import scipy.linalg

# ---- distributions -------------------------------------------------------------------------------


def softmax(logits):
    """Probabilities of one cell [V]."""
    weights = [math.exp(float(value) - float(max(logits))) for value in logits]
    return np.array([weight / sum(weights) for weight in weights])


def guided_logits(cond, uncond, guidance_scale):
    """Guided logits of one cell [V]."""
    return np.array(
        [float(u) + guidance_scale * (float(c) - float(u)) for c, u in zip(cond, uncond, strict=True)]
    )


def kl(p, q):
    """KL(p ‖ q) of two distributions [V]."""
    return sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def entropy(p):
    """Entropy of one distribution [V]."""
    return -sum(float(a) * math.log(a) for a in p if a > 0)


def divergence(name, student_logits, teacher_logits, alpha=0.5, temperature=1.0):
    """Divergence of one cell; the Jensen-Shannon one from its entropy form."""
    p = softmax(np.asarray(student_logits, dtype=float) / temperature)
    q = softmax(np.asarray(teacher_logits, dtype=float) / temperature)
    if name == "reverse_kl":
        return kl(p, q)
    if name == "forward_kl":
        return kl(q, p)
    mixture = alpha * p + (1 - alpha) * q
    return entropy(mixture) - alpha * entropy(p) - (1 - alpha) * entropy(q)


# ---- codebooks -----------------------------------------------------------------------------------


def delayed_grid(codes, fill, pairs_share_a_delay=False):
    """Codes [K][T] on the decoder's grid, start column included, by walking every cell."""
    num_codebooks, num_frames = len(codes), len(codes[0])
    delays = [k // 2 if pairs_share_a_delay else k for k in range(num_codebooks)]
    columns = num_frames + max(delays) + 1
    grid = [[fill] * columns for _ in range(num_codebooks)]
    for k in range(num_codebooks):
        for column in range(columns):
            frame = column - 1 - delays[k]
            if 0 <= frame < num_frames:
                grid[k][column] = codes[k][frame]
    return grid


def distillation_loss(
    hidden,
    heads,
    codes,
    teacher_cond,
    teacher_uncond,
    teacher_heads,
    scales,
    divergence_weights,
    logp_weights=None,
    old_logps=None,
    clip=(0.8, 1.2),
    name="reverse_kl",
    alpha=0.5,
    temperature=1.0,
    pairs_share_a_delay=False,
):
    """The whole loss, one code after the other; `scales` and the weights are per code [N, K, T].

    Returns loss, divergences, log-probs and entropies.
    """
    num_rows, num_codebooks, num_frames = codes.shape
    per_code = np.zeros((3, num_rows, num_codebooks, num_frames))
    loss = 0.0
    for n, k, t in itertools.product(range(num_rows), range(num_codebooks), range(num_frames)):
        step = t + (k // 2 if pairs_share_a_delay else k)
        student = heads[k] @ hidden[n, step]
        cond, uncond = teacher_heads[k] @ teacher_cond[n, step], teacher_heads[k] @ teacher_uncond[n, step]
        teacher = guided_logits(cond, uncond, scales[n, k, t])
        p = softmax(student / temperature)
        logp = math.log(p[codes[n, k, t]])
        value = divergence(name, student, teacher, alpha, temperature)
        per_code[:, n, k, t] = value, logp, entropy(p)
        loss += divergence_weights[n, k, t] * value
        if logp_weights is None:
            continue
        if old_logps is None:
            loss += logp_weights[n, k, t] * logp
        else:
            loss += clipped_surrogate(logp, old_logps[n, k, t], -logp_weights[n, k, t], *clip)
    return loss, *per_code


# ---- diversity -----------------------------------------------------------------------------------


def cosine_distance(a, b):
    """1 − cos of two vectors."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    norm = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(y) ** 2 for y in b))
    return 1 - dot / norm


def diversity_rewards(group):
    """Mean distance of each generation [G][D] to the others."""
    return np.array(
        [np.mean([cosine_distance(a, b) for j, b in enumerate(group) if j != i]) for i, a in enumerate(group)]
    )


def diversity_advantages(group):
    """2·(reward − mean distance among the pairs that do not contain the generation)."""
    rewards = diversity_rewards(group)
    advantages = []
    for i in range(len(group)):
        others = [vector for j, vector in enumerate(group) if j != i]
        baseline = np.mean([cosine_distance(a, b) for a, b in itertools.combinations(others, 2)])
        advantages.append(2 * (rewards[i] - baseline))
    return np.array(advantages)


def prefix_rewards(prefixes, group):
    """Centred prefix rewards of one prompt: prefixes [G][M][D], whole clips [G][D]."""
    size = len(group)
    features = np.zeros((size, len(prefixes[0])))
    for i, m in np.ndindex(features.shape):
        others = [j for j in range(size) if j != i]
        own = np.mean([cosine_distance(prefixes[i][m], group[j]) for j in others])
        without = [cosine_distance(prefixes[j][m], group[k]) for j in others for k in others if j != k]
        features[i, m] = own - np.mean(without)
    return features


def segment_advantages(values, advantage, gae_lambda):
    """GAE of one clip from its definition: values [M], final advantage."""
    edges = [0.0, *values, advantage]
    deltas = [b - a for a, b in itertools.pairwise(edges)]
    return [
        sum(gae_lambda**ahead * delta for ahead, delta in enumerate(deltas[start:]))
        for start in range(len(deltas))
    ]


def vendi_score(group):
    """exp of the entropy of the eigenvalues of the cosine matrix [G, G] / G."""
    similarity = np.array([[1 - cosine_distance(a, b) for b in group] for a in group])
    eigenvalues = scipy.linalg.eigvals(similarity / len(group)).real
    return math.exp(-sum(value * math.log(value) for value in eigenvalues if value > 1e-15))


# ---- policy gradient -----------------------------------------------------------------------------


def leave_one_out_advantages(rewards):
    """Reward minus the mean of the others."""
    return np.array(
        [r - np.mean([s for j, s in enumerate(rewards) if j != i]) for i, r in enumerate(rewards)]
    )


def clipped_surrogate(logp, old_logp, advantage, low, high):
    """PPO's loss of one code, by cases."""
    ratio = math.exp(logp - old_logp)
    if advantage >= 0:
        return -advantage * min(ratio, high)
    return -advantage * max(ratio, low)


# ---- statistics ----------------------------------------------------------------------------------


def frechet_distance(x, y):
    """With SciPy's root of the product of the covariances."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root.real))


def median_distance(points):
    """Median Euclidean distance between two different points."""
    return float(np.median([np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)]))


def rbf(a, b, bandwidth):
    """Gaussian kernel of two vectors."""
    return math.exp(-float(np.sum((a - b) ** 2)) / (2 * bandwidth**2))


def mmd(x, y, kernel):
    """Unbiased MMD² by loops over pairs of different points."""
    within = [
        np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)
    ]
    return within[0] + within[1] - 2 * np.mean([kernel(a, b) for a in x for b in y])


def hypervolume(points, reference):
    """Area of the union of rectangles, cell by cell of the grid their edges make."""
    xs = sorted({reference[0], *(x for x, _ in points if x > reference[0])})
    ys = sorted({reference[1], *(y for _, y in points if y > reference[1])})
    return sum(
        (right - left) * (top - bottom)
        for left, right in itertools.pairwise(xs)
        for bottom, top in itertools.pairwise(ys)
        if any(x >= right and y >= top for x, y in points)
    )
