"""Sharded weights, as far as one CPU process can show them."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from diverse_cfg.policies.musicgen.model import encode_text
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.policies.sampler.rollout import RolloutWeights, sample_codes
from diverse_cfg.policies.sampler.weights import whole_weights
from diverse_cfg.trainer.disguises import route_forward
from diverse_cfg.trainer.objective import LossSettings, student_terms
from diverse_cfg.trainer.setup import check_sharding
from diverse_cfg.types import Clips
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor
from tests.training import tiny_args

SETTINGS = LossSettings("reverse_kl", 0.5, 1.0, 0.2, None, (0, 1, 2, 3), 256)


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.decoder.model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    route_forward(model)
    return fully_shard(model, mesh=mesh)


def clips(model):
    condition = encode_text(model, tiny_processor(), PROMPTS)
    codes = sample_codes(model, condition, 9, seed=1, weights=RolloutWeights.from_model(model)).codes
    return codes, condition


def test_a_sharded_policy_plays_and_learns_like_a_whole_one(one_process):
    """Fault: a rollout from shards, or a loss outside the forward pass in which the weights are whole."""
    plain = tiny_musicgen()
    codes, condition = clips(plain)
    advantages = torch.linspace(-1, 1, codes.numel()).view(codes.shape)
    batch = Clips(codes, 3200, condition=condition, advantages=advantages)
    student_terms(as_policy(plain), batch, SETTINGS)[0].loss.backward()

    model = sharded(tiny_musicgen())
    with whole_weights(model):
        played, _ = clips(model)
    assert torch.equal(played, codes)
    terms, _ = model(run=lambda: student_terms(as_policy(model), batch, SETTINGS))
    terms.loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-4)


def accelerator(**plugins):
    return SimpleNamespace(state=SimpleNamespace(**plugins))


REFUSED = [
    (accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=3)), {}, "zero_stage=3"),
    (accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=2)), {"adaptive_clip": 1.5}, "adaptive_clip"),
    (accelerator(fsdp_plugin=SimpleNamespace(fsdp_version=1)), {}, "fsdp_version=1"),
    (accelerator(fsdp_plugin=SimpleNamespace(fsdp_version=2)), {"ema_decay": 0.9}, "ema_decay=0.9"),
    (accelerator(fsdp_plugin=SimpleNamespace(fsdp_version=2)), {"term_norm_steps": 5}, "term_norm_steps=5"),
    (
        accelerator(fsdp_plugin=SimpleNamespace(fsdp_version=2)),
        {"rollout_backend": "transformers"},
        "use rollout_backend='fast'",
    ),
    (
        accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=2)),
        {"guidance_scale": [1, 5]},
        r"guidance_scale=\[1, 5\] with FSDP or DeepSpeed",
    ),
]


@pytest.mark.parametrize(("state", "settings", "message"), REFUSED)
def test_what_shards_cannot_do_is_refused(tmp_path, state, settings, message):
    """Fault: hours of training from weights of which each process has seen a part."""
    with pytest.raises(ValueError, match=message):
        check_sharding(state, tiny_args(tmp_path, **settings))


@pytest.mark.parametrize("plugins", [{}, {"fsdp_plugin": SimpleNamespace(fsdp_version=2)}])
def test_what_works_is_not_refused(tmp_path, plugins):
    check_sharding(accelerator(**plugins), tiny_args(tmp_path))
