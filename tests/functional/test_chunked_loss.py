"""The chunked loss: values against loops, gradients against finite differences, memory measured."""

import dataclasses

import numpy as np
import pytest
import torch

from diverse_cfg.functional.distillation import GuidedTeacher, distillation_loss
from tests import oracles
from tests.functional.autograd_loss import autograd_loss

N, T, H, V = 2, 5, 3, 4
NAMES = ["reverse_kl", "forward_kl", "generalized_jsd"]
MONO, STEREO = (0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)


def inputs(delays=MONO, dtype=torch.float64, seed=0):
    """Student and teacher material of a tiny decoder, codes and weights per code."""
    generator = torch.Generator().manual_seed(seed)
    num_codebooks = len(delays)
    steps = T + 3

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    codes = torch.randint(V, (N, num_codebooks, T), generator=generator)
    teacher = GuidedTeacher(draw(N, steps, H), draw(N, steps, H), draw(num_codebooks, V, H), 3.0)
    weights = draw(N, num_codebooks, T).abs(), draw(N, num_codebooks, T)
    return draw(N, steps, H), draw(num_codebooks, V, H), codes, teacher, *weights


def run(material, chunk_size, autocast=False, **options):
    """Result and gradients of the loss times 1.7, as an outer loss would scale it; None is autograd's."""
    hidden, heads, codes, teacher, divergence_weights, logp_weights = material
    hidden, heads = hidden.clone().requires_grad_(), heads.clone().requires_grad_()
    options = {
        "divergence_weights": divergence_weights,
        "logp_weights": logp_weights,
        "delays": MONO,
    } | options
    loss = autograd_loss if chunk_size is None else distillation_loss
    if chunk_size is not None:
        options["chunk_size"] = chunk_size
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        terms = loss(hidden, heads, codes, teacher, **options)
    (1.7 * terms.loss).backward()
    return terms, (hidden.grad, heads.grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("delays", "scale", "temperature", "old"),
    [
        (MONO, 3.0, 1.0, False),
        (STEREO, 3.0, 0.7, True),
        (MONO, "schedule", 1.3, True),
        (STEREO, "per code", 1.0, False),
    ],
)
def test_matches_the_loop(name, delays, scale, temperature, old):
    """Catches a code read at the wrong step, a schedule on the wrong frames, an untempered term."""
    hidden, heads, codes, teacher, u, w = inputs(delays)
    scales = {"schedule": 4 * torch.rand(T).double(), "per code": 4 * torch.rand(codes.shape).double()}
    guidance = scales.get(scale, scale)
    old_logps = -1.5 + 0.5 * torch.randn(codes.shape, dtype=torch.float64) if old else None
    terms = distillation_loss(
        hidden,
        heads,
        codes,
        dataclasses.replace(teacher, guidance_scale=guidance),
        divergence_weights=u,
        logp_weights=w,
        old_logps=old_logps,
        epsilon=0.2,
        epsilon_high=0.3,
        divergence=name,
        alpha=0.3,
        temperature=temperature,
        delays=delays,
        chunk_size=4,
    )
    expected = oracles.distillation_loss(
        hidden.numpy(),
        heads.numpy(),
        codes.numpy(),
        teacher.cond_hidden_states.numpy(),
        teacher.uncond_hidden_states.numpy(),
        teacher.head_weights.numpy(),
        np.broadcast_to(np.asarray(guidance), codes.shape),
        u.numpy(),
        w.numpy(),
        None if old_logps is None else old_logps.numpy(),
        clip=(0.8, 1.3),
        name=name,
        alpha=0.3,
        temperature=temperature,
        pairs_share_a_delay=delays == STEREO,
    )
    for value, oracle in zip(terms, expected, strict=True):
        np.testing.assert_allclose(value.numpy(), oracle, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("old", [False, True])
def test_gradient_against_finite_differences(name, old):
    """Catches any error in the analytic gradient, of divergence or surrogate, in states or heads."""
    hidden, heads, codes, teacher, u, w = inputs()
    old_logps = -1.5 + 0.5 * torch.randn(codes.shape, dtype=torch.float64) if old else None

    def loss(hidden, heads):
        return distillation_loss(
            hidden,
            heads,
            codes,
            teacher,
            divergence_weights=u,
            logp_weights=w,
            old_logps=old_logps,
            divergence=name,
            alpha=0.3,
            temperature=0.8,
            delays=MONO,
            chunk_size=3,
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), heads.requires_grad_()))


@pytest.mark.parametrize("delays", [MONO, STEREO])
@pytest.mark.parametrize("only", ["both", "divergence", "policy gradient"])
def test_chunks_equal_autograd(delays, only):
    """Catches rows lost or counted twice at the borders of chunks, and one term leaking into the other."""
    material = inputs(delays)
    options = {"delays": delays}
    if only == "divergence":
        options["logp_weights"] = None
    if only == "policy gradient":
        material = (*material[:3], None, *material[4:])
    terms, gradients = run(material, None, **options)
    for chunk_size in (1, 4, 7, 1000):
        chunked, chunked_gradients = run(material, chunk_size, **options)
        for value, expected in zip((*chunked, *chunked_gradients), (*terms, *gradients), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    assert (terms.divergences is None) == (only == "policy gradient")


def test_zero_policy_weight_is_pure_distillation_to_the_bit():
    """Catches a policy term that disturbs the distillation when its coefficient is zero."""
    material = inputs(dtype=torch.float32)
    zero, zero_gradients = run(material, 3, logp_weights=0.0)
    none, none_gradients = run(material, 3, logp_weights=None)
    assert torch.equal(zero.loss, none.loss)
    assert all(torch.equal(a, b) for a, b in zip(zero_gradients, none_gradients, strict=True))


def test_guidance_of_one_needs_no_null_rows():
    """Catches a teacher without guidance that still reads the null rows."""
    material = inputs()
    alone = dataclasses.replace(material[3], uncond_hidden_states=None, guidance_scale=1.0)
    both = dataclasses.replace(material[3], guidance_scale=1.0)
    first, second = (run((*material[:3], t, *material[4:]), 4)[0] for t in (alone, both))
    assert torch.equal(first.loss, second.loss)


def test_half_precision_model():
    """Catches a loss in bfloat16 (under autocast too), and gradients that are not of the parameters' type."""
    material = inputs(dtype=torch.bfloat16)
    hidden, heads, codes, teacher, u, w = material
    widened = GuidedTeacher(*(x.float() for x in dataclasses.astuple(teacher)[:3]), 3.0)
    terms, gradients = run((hidden.float(), heads.float(), codes, widened, u.float(), w.float()), None)
    half, half_gradients = run(material, 4, autocast=True)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, terms.loss, rtol=1e-6, atol=1e-6)
    assert all(gradient.dtype == torch.bfloat16 for gradient in half_gradients)
    for gradient, expected in zip(half_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=1e-3)


def test_frozen_heads_and_evaluation():
    """Catches work for heads that LoRA freezes, a graph under no_grad, and outputs that carry gradients."""
    hidden, heads, codes, teacher, *_ = inputs()
    hidden.requires_grad_()
    terms = distillation_loss(hidden, heads, codes, teacher, delays=MONO, chunk_size=4)
    assert not any(values.requires_grad for values in (terms.divergences, terms.logps, terms.entropies))
    terms.loss.backward()
    assert hidden.grad is not None and heads.grad is None
    with torch.no_grad():
        silent = distillation_loss(hidden, heads, codes, teacher, delays=MONO, chunk_size=4)
    assert not silent.loss.requires_grad
    assert torch.equal(silent.loss, terms.loss)


def test_a_weight_of_zero_leaves_a_clip_out():
    """Catches a masked clip that still moves the student."""
    material = inputs()
    keep = torch.tensor([1.0, 0.0], dtype=torch.float64)
    _, (hidden_gradient, _) = run(material, 4, divergence_weights=keep, logp_weights=keep, temperature=0.9)
    assert hidden_gradient[0].abs().min() > 0
    assert not hidden_gradient[1].any()


def peak_bytes(function):
    """Largest number of bytes allocated at once while `function` runs, from the allocator's own log."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_peak_memory():
    """Catches a full distribution that is kept: at most 2.5 logits tensors where autograd holds over 6."""
    num_codebooks, vocab, size, steps = 4, 256, 8, 403
    hidden, heads = torch.randn(2, steps, size), torch.randn(num_codebooks, vocab, size)
    codes = torch.randint(vocab, (2, num_codebooks, steps - 3))
    teacher = GuidedTeacher(torch.randn(2, steps, size), torch.randn(2, steps, size), heads, 3.0)
    logits_bytes = 2 * steps * num_codebooks * vocab * 4
    peaks = {}
    for chunk_size in (None, 64, 256):
        material = hidden, heads, codes, teacher, 1.0, 0.1
        peaks[chunk_size] = peak_bytes(lambda size=chunk_size, all=material: run(all, size)) / logits_bytes
    assert peaks[None] > 6
    assert peaks[256] < 2.5
    assert peaks[64] < 0.8


BAD = [
    (
        {"codes": torch.zeros(N, 4, T + 1, dtype=torch.long)},
        r"need hidden_states \[2, 9, H\] .*got \(2, 8, 3\)",
    ),
    ({"head_weights": torch.zeros(3, V, H)}, r"head_weights must be \[4, V, 3\]"),
    ({"hidden_states": torch.zeros(N, T + 3)}, r"hidden_states must have shape \[N, S, H\]"),
    ({"delays": (0, 0, 1, 1)}, r"need hidden_states \[2, 6, H\] with delays=\(0, 0, 1, 1\)"),
    ({"delays": (0, 1, 3)}, r"4 codebooks need one delay each, got delays=\(0, 1, 3\)"),
    ({"divergence": "kl"}, "divergence must be one of reverse_kl"),
    ({"alpha": 1.0, "divergence": "generalized_jsd"}, "alpha must lie between"),
    ({"temperature": -1.0}, "temperature must be a finite number above 0"),
    ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ({"epsilon": 1.5}, "0 < epsilon < 1"),
    ({"divergence_weights": float("nan")}, "divergence_weights must be finite"),
    ({"divergence_weights": torch.ones(3)}, r"divergence_weights must be one per clip \[2\] or per code"),
    ({"logp_weights": torch.ones(N, 4)}, r"logp_weights must be one per clip \[2\] or per code"),
    ({"old_logps": torch.zeros(N, 4)}, "old_logps and codes differ in shape"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_bad_input_is_named(change, message):
    """Catches a mismatch that would broadcast, or a setting that means nothing, before any work is done."""
    hidden, heads, codes, teacher, *_ = inputs()
    arguments = {"hidden_states": hidden, "head_weights": heads, "codes": codes, "teacher": teacher}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**(arguments | {"delays": MONO} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uncond_hidden_states": None}, "guidance_scale=3.0 needs uncond_hidden_states"),
        (
            {"cond_hidden_states": torch.zeros(N, 1, H), "uncond_hidden_states": torch.zeros(N, 1, H)},
            "like the student",
        ),
        ({"uncond_hidden_states": torch.zeros(N, 1, H)}, "differ in shape"),
        ({"head_weights": torch.zeros(4, V + 1, H)}, "vocabulary as the student's"),
        ({"guidance_scale": torch.ones(T + 1)}, "does not broadcast"),
    ],
)
def test_bad_teacher_is_named(change, message):
    """Catches a teacher of another shape than the student's."""
    hidden, heads, codes, teacher, *_ = inputs()
    with pytest.raises(ValueError, match=message):
        distillation_loss(hidden, heads, codes, dataclasses.replace(teacher, **change), delays=MONO)


def test_a_code_outside_the_vocabulary_fails():
    """Catches the sentinel (or a padding token) read as a code."""
    hidden, heads, codes, teacher, *_ = inputs()
    codes[0, 1, 2] = -1
    with pytest.raises((RuntimeError, IndexError)):
        distillation_loss(hidden, heads, codes, teacher, delays=MONO)
