"""The loop's static body, which CUDA graphs replay: held against the eager one, on a CPU."""

import gc
import math
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import encode_text
from diverse_cfg.policies.sampler.draws import SamplingSettings, keyed_noise
from diverse_cfg.policies.sampler.loop import DecodeLoop
from diverse_cfg.policies.sampler.rollout import RolloutWeights, fast_generate, sample_codes
from diverse_cfg.types import TextCondition
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor

FRAMES = 18


@pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
@pytest.mark.parametrize(("guidance_scale", "negative"), [(1.0, False), (3.0, False), (3.0, True)])
def test_the_static_body_of_gpus_plays_the_same_clips(channels, guidance_scale, negative, monkeypatch):
    """What a CUDA graph replays: masked contexts in buckets, tensor positions, buffers used again."""
    monkeypatch.setattr("diverse_cfg.policies.sampler.loop.BUCKET", 8)
    model = load_policy(tiny_musicgen(channels))
    condition = encode_text(model, tiny_processor(), PROMPTS)
    if negative:  # the second half of the rows has text, too
        condition = condition.cat(condition.select([1, 0, 3, 2]))
    settings = SamplingSettings(guidance_scale, top_k=9)
    noise = keyed_noise(0, range(4), 4 * channels, FRAMES, model.decoder.config.vocab_size)
    eager = DecodeLoop(RolloutWeights.from_model(model), condition, 4, FRAMES, settings)
    assert eager.mode == "eager"
    eager.run(noise)
    weights = RolloutWeights.from_model(model)
    reversed_rows = torch.arange(len(condition)).flip(0)
    static = DecodeLoop(weights, condition.select(reversed_rows), 4, FRAMES, settings, mode="static")
    static.run(noise)
    assert not torch.equal(static.codes, eager.codes)
    static.decoder.cache[0].fill_(math.nan)  # as a failed run leaves it
    static.reset(condition)
    static.run(noise)
    assert torch.equal(static.codes, eager.codes)
    torch.testing.assert_close(static.logps, eager.logps, atol=1e-5, rtol=0)


class OnOneDevice(TorchDispatchMode):
    """Fails at an operation that touches a tensor of another device, or an index that is a list."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.index.Tensor, func
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), func
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_touches_the_host(dtype, monkeypatch):
    """A capture forbids copies from and to the host. On the meta device, reading a value raises, too."""
    monkeypatch.setattr(
        "diverse_cfg.policies.sampler.weights._is_better_packed", lambda *_: False
    )  # as on a GPU
    weights = RolloutWeights.from_model(load_policy(tiny_musicgen()), dtype)
    weights = RolloutWeights(weights.shape, {name: t.to("meta") for name, t in weights.tensors.items()})
    condition = TextCondition(
        torch.empty(4, 32, 12, device="meta"), torch.empty(4, 32, dtype=torch.long, device="meta")
    )
    every_filter = SamplingSettings(3.0, temperature=0.9, top_k=9, top_p=0.9, min_p=0.01)
    adaptive = SamplingSettings([3.0] * FRAMES, adaptive_guidance=(0.1, 5))
    for settings in (every_filter, SamplingSettings(1.0, temperature=0.0), adaptive):
        loop = DecodeLoop(weights, condition, 4, FRAMES, settings, mode="static")
        with OnOneDevice(), torch.no_grad(), monkeypatch.context() as patch:
            for constructor in ("tensor", "as_tensor", "asarray"):  # they copy from the host
                patch.delattr(torch, constructor)
            loop._advance(16)
    host = torch.zeros(3)
    with OnOneDevice(), pytest.raises(AssertionError, match="_to_copy"):
        host.to("meta")
    with OnOneDevice(), pytest.raises(AssertionError, match="index"):
        torch.empty(3, device="meta")[[0, 1]]


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs played on a CPU: a replay runs what was captured. Returns the captured graphs."""
    captured, last, advance = [], [], DecodeLoop._advance

    def advancing(loop, length):
        last[:] = [weakref.ref(loop), length, loop.num_clips]
        advance(loop, length)

    class Graph:
        def replay(self):
            advance(self.body[0](), self.body[1])

    @contextmanager
    def capture(graph, pool, capture_error_mode):
        assert pool == "pool"
        yield
        graph.body = tuple(last)
        captured.append(graph)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(DecodeLoop, "_advance", advancing)
    for name, value in {
        "device": nullcontext,
        "Stream": lambda: stream,
        "stream": nullcontext,
        "current_stream": lambda *device: stream,
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph,
        "graph": capture,
        "set_stream": lambda stream: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("diverse_cfg.policies.sampler.loop.BUCKET", 8)
    monkeypatch.setattr("diverse_cfg.policies.sampler.rollout.default_mode", lambda device: "graph")
    monkeypatch.setattr("diverse_cfg.policies.sampler.rollout._TEXT_BUCKET", 4)
    return captured


def graph_codes(model, prompts, weights=None, backend="fast"):
    return fast_generate(
        model,
        prompts,
        processor=tiny_processor(),
        num_frames=FRAMES,
        seed=1,
        decode=False,
        weights=weights,
        rollout_backend=backend,
    ).codes


def test_graphs_are_kept_for_texts_that_fit_and_weights_that_change(graphs):
    """Faults: a capture for every batch; text, context or weights of the last batch still inside a graph."""
    model = load_policy(tiny_musicgen())
    weights = RolloutWeights.from_model(model)
    for prompts, captures in ((PROMPTS[:2], 3), (["sad cello"] * 2, 3), (PROMPTS[2:], 6), (PROMPTS[:2], 6)):
        expected = graph_codes(model, prompts, backend="transformers")
        assert torch.equal(graph_codes(model, prompts, weights), expected)
        assert len(graphs) == captures
    assert [graph.body[1] for graph in graphs] == [8, 16, 24] * 2
    with torch.no_grad():
        model.decoder.lm_heads[0].weight.mul_(-1)
    assert torch.equal(graph_codes(model, prompts, weights), expected)  # a snapshot shares nothing
    weights.refresh(model)
    expected = graph_codes(model, prompts, backend="transformers")
    assert torch.equal(graph_codes(model, prompts, weights), expected)
    assert len(graphs) == 6


def test_batches_of_nearly_the_same_size_share_graphs(graphs):
    """Seven clips by four are 4 + 3. Fault: every call captures both sizes again, and again."""
    model = load_policy(tiny_musicgen())
    weights = RolloutWeights.from_model(model)
    condition = encode_text(model, tiny_processor(), PROMPTS).select([0, 1, 2, 3, 0, 1, 2])
    for settings in (
        {},
        {"guidance_scale": 3.0, "negative_condition": condition.select([3, 2, 1, 0, 3, 2, 1])},
    ):
        before = len(graphs)
        expected = sample_codes(model, condition, FRAMES, batch_size=7, **settings).codes
        alone = len(graphs)
        for _ in range(2):
            codes = sample_codes(model, condition, FRAMES, batch_size=4, weights=weights, **settings).codes
            assert torch.equal(codes, expected)
        assert (alone - before, len(graphs) - alone) == (3, 3)
    sample_codes(model, condition.select([0]), FRAMES, weights=weights)
    assert len(graphs) == 15  # for one clip, four rows would be a waste


def test_memory_is_given_back_without_the_garbage_collector(graphs, monkeypatch):
    """Faults: a cycle keeps old caches beside new ones; a snapshot of one call outlives it; graphs of a loop that
    fills the GPU stay there while the training step wants the memory."""
    model = load_policy(tiny_musicgen())
    condition = encode_text(model, tiny_processor(), PROMPTS)
    loops, made = [], DecodeLoop.__init__

    def making(loop, *args, **kwargs):
        assert not any(other() for other in loops), "the loop before is still there"
        made(loop, *args, **kwargs)
        loops.append(weakref.ref(loop.decoder))  # which has the caches

    monkeypatch.setattr(DecodeLoop, "__init__", making)
    gc.collect()
    gc.disable()
    try:
        weights = RolloutWeights.from_model(model)
        for num_clips in (4, 1):
            sample_codes(model, condition.select(slice(0, num_clips)), FRAMES, weights=weights)
        assert loops[-1]() is not None
        weights.loops.clear()
        for function in (sample_codes, lambda *args: graph_codes(model, PROMPTS)):
            function(model, condition, FRAMES)
        assert not any(loop() for loop in loops)
        monkeypatch.setattr(
            "diverse_cfg.policies.sampler.rollout.may_be_kept", lambda nbytes, device: nbytes < 1000
        )
        sample_codes(model, condition, FRAMES, weights=weights)
        assert not weights.loops
        assert not any(loop() for loop in loops)
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_a_capture_that_is_cut_short_leaves_nothing_behind(graphs, error, monkeypatch):
    """Fault: the next batch replays the graphs that there are, and finds one missing."""
    model = load_policy(tiny_musicgen())
    weights = RolloutWeights.from_model(model)
    capture = torch.cuda.graph

    @contextmanager
    def failing(graph, pool, capture_error_mode):
        with capture(graph, pool, capture_error_mode):
            yield
        if len(graphs) == 2:
            raise error

    monkeypatch.setattr(torch.cuda, "graph", failing)
    expected = graph_codes(model, PROMPTS, backend="transformers")
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            graph_codes(model, PROMPTS, weights)
        assert not weights.loops
    assert torch.equal(graph_codes(model, PROMPTS, weights), expected)
    sizes = {graph.body[2] for graph in graphs[2:]}
    assert sizes == ({4} if isinstance(error, KeyboardInterrupt) else {2})


def test_a_graph_that_cannot_be_captured_is_reported_once(monkeypatch, caplog):
    """Never a silent fallback, and the clips are the same."""
    model = load_policy(tiny_musicgen())
    condition = encode_text(model, tiny_processor(), PROMPTS)
    monkeypatch.setattr("diverse_cfg.policies.sampler.loop._failed_captures", set())

    def fail():
        raise RuntimeError("no stream here")

    left_in = []
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: "the caller's")
    monkeypatch.setattr(torch.cuda, "set_stream", left_in.append)
    monkeypatch.setattr(torch.cuda, "Stream", fail)
    noise = keyed_noise(0, range(4), 4, FRAMES, model.decoder.config.vocab_size)
    weights = RolloutWeights.from_model(model)
    for _ in range(2):
        loop = DecodeLoop(weights, condition, 4, FRAMES, SamplingSettings(), mode="graph")
        loop.run(noise)
        assert loop.mode == "static"
    assert [record.getMessage().count("no stream here") for record in caplog.records] == [1]
    assert left_in == ["the caller's"] * 2  # a capture that fails does not leave its own stream
    ours = sample_codes(model, condition, FRAMES).codes
    assert torch.equal(loop.codes[:FRAMES, :, 0].T, ours[:, 0])
