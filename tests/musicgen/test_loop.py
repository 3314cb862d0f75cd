"""The loop's static body, which CUDA graphs replay: held against the eager one, on a CPU."""

import math

import pytest
import torch

from diverse_cfg.musicgen.loop import DecodeLoop
from diverse_cfg.musicgen.policy import encode_text, load_policy
from diverse_cfg.musicgen.rollout import RolloutWeights, sample_codes
from diverse_cfg.musicgen.sampling import SamplingSettings, keyed_uniforms
from diverse_cfg.types import TextCondition
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor

FRAMES = 18


@pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
@pytest.mark.parametrize(("guidance_scale", "negative"), [(1.0, False), (3.0, False), (3.0, True)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_static_body_of_gpus_plays_the_same_clips(
    channels, guidance_scale, negative, compiled, monkeypatch
):
    """What a CUDA graph replays: masked contexts in buckets, tensor positions, buffers used again."""
    if compiled:
        compile = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, **k: compile(f, backend="aot_eager", fullgraph=True, **k)
        )
    monkeypatch.setattr("diverse_cfg.musicgen.loop.BUCKET", 8)
    model = load_policy(tiny_musicgen(channels))
    condition = encode_text(model, tiny_processor(), PROMPTS)
    if negative:  # the second half of the rows has text, too
        condition = TextCondition(
            torch.cat([condition.hidden_states, condition.hidden_states[[1, 0, 3, 2]]]),
            torch.cat([condition.attention_mask, condition.attention_mask[[1, 0, 3, 2]]]),
        )
    settings = SamplingSettings(guidance_scale, top_k=9)
    uniforms = keyed_uniforms(0, range(4), 4 * channels, FRAMES)
    eager = DecodeLoop(RolloutWeights.from_model(model), condition, 4, FRAMES, settings)
    assert eager.mode == "eager"
    eager.run(uniforms)
    weights = RolloutWeights.from_model(model, compiled=compiled)
    reversed_rows = torch.arange(len(condition)).flip(0)
    static = DecodeLoop(weights, condition.select(reversed_rows), 4, FRAMES, settings, mode="static")
    static.run(uniforms)
    assert not torch.equal(static.codes, eager.codes)
    static.decoder.cache[0].fill_(math.nan)  # as a failed run leaves it
    static.reset(condition)
    static.run(uniforms)
    assert torch.equal(static.codes, eager.codes)
    torch.testing.assert_close(static.logps, eager.logps, atol=1e-5, rtol=0)


def test_a_graph_that_cannot_be_captured_is_reported_once(monkeypatch, caplog):
    """Never a silent fallback, and the clips are the same."""
    model = load_policy(tiny_musicgen())
    condition = encode_text(model, tiny_processor(), PROMPTS)
    monkeypatch.setattr("diverse_cfg.musicgen.loop._failed_captures", set())

    def fail():
        raise RuntimeError("no stream here")

    monkeypatch.setattr(torch.cuda, "Stream", fail)
    uniforms = keyed_uniforms(0, range(4), 4, FRAMES)
    weights = RolloutWeights.from_model(model)
    for _ in range(2):
        loop = DecodeLoop(weights, condition, 4, FRAMES, SamplingSettings(), mode="graph")
        loop.run(uniforms)
        assert loop.mode == "static"
    assert [record.getMessage().count("no stream here") for record in caplog.records] == [1]
    ours = sample_codes(model, condition, FRAMES).codes
    assert torch.equal(loop.codes[:FRAMES, :, 0].T, ours[:, 0])
