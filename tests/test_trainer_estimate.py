"""What the trainer says before it begins, against what it then holds."""

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig

from diverse_cfg.policies.policy import as_policy
from diverse_cfg.policies.sampler import batches
from diverse_cfg.policies.sampler.loop import DecodeLoop
from diverse_cfg.trainer import housekeeping
from diverse_cfg.trainer.estimate import Rollout, all_rollouts, memory
from tests.tiny import PROMPTS, tiny_musicgen
from tests.training import tiny_args, tiny_trainer


def needs(policy=None, **settings):
    """An estimate; `clips` of a student's rollout unless `rollouts` says otherwise."""
    defaults = {
        "num_frames": 30,
        "rollouts": [Rollout(False, settings.pop("clips", 8))],
        "trained": 1000,
        "separate_teacher": False,
    }
    given = {name: settings.pop(name) for name in defaults.keys() & settings.keys()}
    args = tiny_args("unused", **{"per_device_train_batch_size": 4, **settings})
    return memory(as_policy(policy or tiny_musicgen()), args, **{**defaults, **given})


def held(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured(trainer, monkeypatch):
    """Train; the estimate that was made, bytes of the fused copies, and of the largest set of caches."""
    estimates, caches, initialise, remember = [], [0], DecodeLoop.__init__, housekeeping.memory

    def watched(loop, weights, condition, num_clips, num_frames, *rest):
        initialise(loop, weights, condition, num_clips, num_frames, *rest)
        caches.append(held(loop.decoder.cache))

    def estimated(*arguments, **settings):
        estimates.append(remember(*arguments, **settings))
        return estimates[-1]

    monkeypatch.setattr(DecodeLoop, "__init__", watched)
    monkeypatch.setattr(housekeeping, "memory", estimated)
    trainer.train()
    copies = sum(held(weights.tensors.values()) for weights in trainer._sample.weights.values())
    return estimates[0], copies / 1e9, max(caches) / 1e9


TEACHER = {"rollout_source": "teacher", "diversity_coef": 0.0}
RUNS = {
    "student": {},
    "student, bfloat16": {"bf16": True},
    "teacher": TEACHER,
    "teacher, bfloat16": TEACHER | {"bf16": True},
    "teacher without guidance": TEACHER | {"guidance_scale": 1.0, "bf16": True},
    "teacher, evaluated with more clips": TEACHER | {"eval_strategy": "steps", "eval_steps": 2},
    "mix": {"rollout_source": "mix"},
    "mix, bfloat16": {"rollout_source": "mix", "bf16": True},
    "mix, mostly student": {"rollout_source": "mix", "teacher_fraction": 0.25, "steps_per_generation": 4},
    "calibrated guard": {"guards": {"distance_quantile": 0.9}},
    "batches of three, used twice": {"rollout_batch_size": 3, "num_iterations": 2},
    "lora": {"rollout_source": "mix", "peft_config": LoraConfig(r=2, lora_alpha=4)},
    "stereo": {"model": 2},
}


@pytest.mark.parametrize("run", RUNS)
def test_rollouts_hold_what_was_estimated(tmp_path, monkeypatch, run):
    """Faults: the teacher's own copy, guidance's double rows or the CPU's wide caches are forgotten; clips are
    counted that are not sampled at once."""
    settings = {"max_steps": 2, "prompts": PROMPTS * 4} | RUNS[run]
    if "eval_steps" in settings:
        settings["per_device_eval_batch_size"] = 32
        monkeypatch.setattr("tests.training.CFGDiversityTrainer", evaluating)
    if "model" in settings:
        settings["model"] = tiny_musicgen(settings["model"])
    monkeypatch.setattr("diverse_cfg.trainer.setup.check_run", lambda *_: None)  # one has nothing to train
    estimate, copies, caches = measured(tiny_trainer(tmp_path, **settings), monkeypatch)
    assert estimate.copies == pytest.approx(copies, rel=0.01)
    assert estimate.caches == pytest.approx(caches, rel=0.01)


def test_stock_generate_needs_no_fused_copy(tmp_path, monkeypatch, capfd):
    estimate, copies, _ = measured(
        tiny_trainer(tmp_path, max_steps=1, rollout_source="mix", rollout_backend="transformers"), monkeypatch
    )
    assert estimate.copies == copies == 0 and estimate.caches > 0
    assert capfd.readouterr().err.count("by stock generate, since rollout_backend='transformers'") == 1


def evaluating(*arguments, **settings):
    """A trainer that evaluates on its own prompts."""
    from diverse_cfg.trainer import CFGDiversityTrainer

    return CFGDiversityTrainer(*arguments, eval_dataset=settings["train_dataset"], **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [{}, {"hidden_size": 12}, {"num_hidden_layers": 3}], ids=str)
def test_the_fused_copys_bytes_are_counted(config, dtype):
    """Fault: a tensor that is left out, or one that keeps float32 counted in half precision."""
    from diverse_cfg.policies.sampler.rollout import RolloutWeights

    policy = tiny_musicgen(**config)
    weights = RolloutWeights.from_model(policy, dtype)
    assert as_policy(policy).snapshot_bytes(dtype) == held(weights.tensors.values())


def test_caches_grow_with_clips_until_the_cap_and_with_their_length(monkeypatch):
    """Fault: clips beyond the batch that the rollout chooses by itself are counted."""
    one = needs(clips=1).caches
    assert [needs(clips=n).caches / one for n in (2, 8, 64, 65, 1000)] == pytest.approx([2, 8, 64, 64, 64])
    assert needs(clips=1000, rollout_batch_size=100).caches == pytest.approx(100 * one)
    monkeypatch.setattr(batches, "_CPU_CACHE_BYTES", int(5.5e9 * one))
    assert needs(clips=1000).caches == pytest.approx(5 * one)
    guided = needs(rollouts=[Rollout(True, 1000, guided=True)])
    assert guided.caches == pytest.approx(2 * 2 * one)
    monkeypatch.undo()
    lengths = [needs(num_frames=frames) for frames in (5, 10, 40, 100)]
    assert all(a.caches < b.caches and a.activations < b.activations for a, b in pairwise(lengths))
    assert len({estimate.copies for estimate in lengths}) == 1


def test_more_generations_per_prompt_need_more(tmp_path):
    """Fault: a count of prompts where clips are meant."""
    by_group = [
        all_rollouts(tiny_args(tmp_path, num_generations=size, per_device_train_batch_size=2 * size), False)
        for size in (4, 8, 16)
    ]
    assert [rollout.clips for (rollout,) in by_group] == [8, 16, 32]


def test_a_frozen_copy_of_the_decoder_is_counted():
    """Fault: a teacher of its own that takes no memory."""
    model = tiny_musicgen()
    decoder = held(model.decoder.parameters()) / 1e9
    assert needs(model, separate_teacher=True).weights - needs(model).weights >= decoder > 0


def test_an_update_and_a_rollout_do_not_add_up():
    estimate = needs()
    assert estimate.activations > estimate.caches > 0
    always = estimate.weights + estimate.optimizer + estimate.copies
    assert estimate.peak == pytest.approx(always + estimate.activations)
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_generations": 2}
    long = needs(clips=64, gradient_checkpointing=True, diversity_coef=0.0, **one)
    assert long.caches > long.activations
    assert long.peak == pytest.approx(long.weights + long.optimizer + long.copies + long.caches)
    assert f"{estimate.peak:.2g} GB per process at the peak" in str(estimate)


def test_adapters_are_no_part_of_a_fused_copy(tmp_path):
    plain, adapted = tiny_trainer(tmp_path), tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, lora_alpha=4))
    found = [trainer._policy.snapshot_bytes(torch.float32) for trainer in (plain, adapted)]
    assert found[0] == found[1]
