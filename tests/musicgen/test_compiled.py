"""The body that GPUs replay, compiled for this CPU by torch's real compiler."""

import shutil

import pytest
import torch

from diverse_cfg.musicgen.loop import DecodeLoop
from diverse_cfg.musicgen.policy import encode_text, load_policy
from diverse_cfg.musicgen.sampling import SamplingSettings, keyed_noise
from diverse_cfg.musicgen.weights import RolloutWeights
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="torch.compile needs a C++ compiler on a CPU",
)
def test_a_compiled_loop_plays_the_same_clips():
    model = load_policy(tiny_musicgen())
    condition = encode_text(model, tiny_processor(), PROMPTS)
    noise = keyed_noise(0, range(4), 4, 10, model.decoder.config.vocab_size)
    settings = SamplingSettings(3.0, top_k=9)
    eager = DecodeLoop(RolloutWeights.from_model(model), condition, 4, 10, settings, mode="eager")
    eager.run(noise)
    weights = RolloutWeights.from_model(model, compiled=True)
    static = DecodeLoop(weights, condition, 4, 10, settings, mode="static")
    static.run(noise)
    assert torch.equal(static.codes, eager.codes)
    torch.testing.assert_close(static.logps, eager.logps, atol=1e-5, rtol=0)
