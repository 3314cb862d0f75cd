"""On an accelerator: `pytest -m gpu`. What a CPU cannot show: that graphs are captured, and play the CPU's clips."""

import copy

import pytest
import torch

from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import encode_text
from diverse_cfg.policies.sampler import loop as loop_module
from diverse_cfg.policies.sampler.rollout import RolloutWeights, fast_generate, sample_codes
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
FRAMES = 18


@pytest.fixture(autouse=True)
def captures(monkeypatch):
    """Short buckets, so that several are captured; a capture that fails is an error here."""
    monkeypatch.setattr(loop_module, "BUCKET", 8)
    monkeypatch.setattr(loop_module, "_failed_captures", set())
    yield
    assert not loop_module._failed_captures


@pytest.fixture
def policies():
    """The same policy on the CPU and on the GPU."""
    policy = load_policy(tiny_musicgen())
    return policy, copy.deepcopy(policy).to("cuda")


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0, "top_k": 9}, {"temperature": 0.0}])
def test_graphs_play_the_clips_of_a_cpu(policies, settings):
    on_cpu, on_gpu = policies
    weights = RolloutWeights.from_model(on_gpu)
    for prompts in (PROMPTS, PROMPTS[:3]):  # the second time on the same graphs
        condition = encode_text(on_cpu, tiny_processor(), prompts)
        expected = sample_codes(on_cpu, condition, FRAMES, seed=1, **settings).codes
        codes = sample_codes(on_gpu, condition.to("cuda"), FRAMES, seed=1, weights=weights, **settings).codes
        assert torch.equal(codes.cpu(), expected)
    (loop,) = weights.loops.values()
    assert loop.mode == "graph"
    assert loop.num_clips == len(PROMPTS)


def test_graphs_follow_weights_that_change(policies):
    on_cpu, on_gpu = policies
    weights = RolloutWeights.from_model(on_gpu)
    for step in range(2):
        for policy in policies:
            with torch.no_grad():
                policy.decoder.lm_heads[0].weight.mul_(-1)
        weights.refresh(on_gpu)
        condition = encode_text(on_cpu, tiny_processor(), PROMPTS)
        expected = sample_codes(on_cpu, condition, FRAMES, seed=step).codes
        codes = sample_codes(on_gpu, condition.to("cuda"), FRAMES, seed=step, weights=weights).codes
        assert torch.equal(codes.cpu(), expected)


def test_memory_returns_to_what_it_was(policies):
    """Three calls: no caches and no graphs of earlier ones stay behind."""
    _, on_gpu = policies
    held = []
    for num_generations in (1, 3, 2):
        fast_generate(
            on_gpu,
            PROMPTS,
            processor=tiny_processor(),
            num_frames=FRAMES,
            num_generations=num_generations,
            decode=False,
        )
        held.append(torch.cuda.memory_allocated())
    assert max(held) - min(held) < 1 << 20
