"""Runs that must be the same run: other batching, killed and resumed, β = 0 against no reward at all."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from diverse_cfg.rewards import DiversityReward
from tests.tiny import PROMPTS, tiny_musicgen
from tests.training import WaveEmbedder, largest_difference, losses, tiny_trainer, trained

LORA = LoraConfig(r=2, lora_alpha=4)


def run(folder, resume=None, **settings):
    trainer = tiny_trainer(folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "generalized_jsd"])
def test_one_batch_of_eight_is_eight_batches_of_one(tmp_path, divergence):
    """Fault: a mean over micro-batches where one over the batch is meant, or clips that depend on it."""
    whole = run(tmp_path / "a", divergence=divergence)
    parts = run(
        tmp_path / "b", divergence=divergence, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert largest_difference(trained(whole), trained(parts)) < 1e-4


def test_rollout_batches_change_nothing(tmp_path):
    """Fault: a clip's noise depends on the batch it is sampled in."""
    assert losses(run(tmp_path / "a")) == losses(run(tmp_path / "b", rollout_batch_size=3))


BLOCKS = {
    "every step": {},
    "inside accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "between updates on the same clips": {"num_iterations": 2},
    "inside a generation block": {"per_device_train_batch_size": 4, "steps_per_generation": 4},
    "prefix baseline, average, adaptive clip": {
        "prefix_baseline": True,
        "ema_decay": 0.9,
        "adaptive_clip": 1.0,
    },
}


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_killed_run_continues_exactly(tmp_path, block, peft_config):
    """Fault: the checkpoint lacks something that the run needs. An epoch has two steps, and is crossed."""
    settings = {
        **BLOCKS[block],
        "peft_config": peft_config,
        "max_steps": 5,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    straight = run(tmp_path / "straight", **settings)
    again = run(tmp_path / "again", resume=str(tmp_path / "straight" / "checkpoint-3"), **settings)
    assert losses(again)[-2:] == losses(straight)[-2:]
    assert largest_difference(trained(straight), trained(again)) == 0.0
    files = sorted(
        (tmp_path / "straight" / "checkpoint-5").glob("*.safetensors")
    )  # raw weights, average, state
    assert len(files) == 2 + ("ema_decay" in settings) + ("num_iterations" in settings) + (
        "generation" in block
    )
    for file in files:
        assert (
            largest_difference(load_file(file), load_file(tmp_path / "again" / "checkpoint-5" / file.name))
            == 0
        )


def test_zero_coefficient_is_pure_distillation_to_the_bit(tmp_path):
    """Fault: a reward that is weighted with 0 still leaves rounding, or NaN, in the gradient."""
    rewarded = run(tmp_path / "a", diversity_coef=0.0)
    plain = run(tmp_path / "b", diversity_coef=0.0, reward=None)
    assert losses(rewarded) == losses(plain)
    assert largest_difference(trained(rewarded), trained(plain)) == 0.0
    assert "reward/diversity" in rewarded.state.log_history[0]


def test_diversity_changes_the_run(tmp_path):
    """The other side of the test above."""
    assert losses(run(tmp_path / "a", diversity_coef=0.0)) != losses(run(tmp_path / "b"))


def test_teacher_stays_and_student_moves(tmp_path):
    """Fault: teacher and student share weights, so that the divergence compares the student with itself."""
    trainer = tiny_trainer(tmp_path)
    before = {name: p.clone() for name, p in trainer._teacher.policy.model.named_parameters()}
    start = trained(trainer)
    trainer.train()
    after = dict(trainer._teacher.policy.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = trained(trainer)
    assert all(not torch.equal(start[name], moved[name]) for name in start)
    assert not any(name.startswith(("text_encoder", "audio_encoder")) for name in start)


@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "fresh"),
    [(1, 1, 1, True), (4, 2, 1, True), (2, 1, 2, True), (1, 1, 2, False), (1, 2, 1, False), (3, 2, 1, False)],
)
def test_old_log_probs_are_kept_where_they_can_differ(
    tmp_path, accumulation, per_generation, iterations, fresh
):
    """Fault: clips that outlive an update are taken for fresh ones (3 micro-batches, blocks of 2)."""
    trainer = tiny_trainer(
        tmp_path,
        prompts=PROMPTS * 4,  # an epoch's end would cut accumulation short
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        max_steps=2,
    )
    trainer.train()
    assert trainer._on_policy == fresh
    ratios = [entry["ratio/mean"] for entry in trainer.state.log_history if "ratio/mean" in entry]
    assert bool(ratios) != fresh
    assert fresh or any(abs(ratio - 1) > 1e-5 for ratio in ratios)


def test_the_divergence_falls(tmp_path):
    """Fault: a sign; the loss would be reached by walking away from the teacher."""
    trainer = run(tmp_path, diversity_coef=0.0, max_steps=25)
    values = [entry["kl/clip"] for entry in trainer.state.log_history if "kl/clip" in entry]
    assert sum(values[-5:]) < 0.6 * sum(values[:5])


def test_mixed_rollouts_keep_groups_and_share(tmp_path):
    """Fault: a group is split between student and teacher, or the teacher's share is not kept."""
    trainer = tiny_trainer(tmp_path, rollout_source="mix", teacher_fraction=0.25)
    rows = []
    for step in range(16):
        trainer._step = step
        rows.append(trainer._teacher_rows(8))
    groups = torch.cat(rows).view(-1, 4)
    assert bool((groups.all(dim=1) == groups.any(dim=1)).all())
    assert groups.float().mean().item() == 0.25


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, peft_config):
    """Fault: recomputed activations differ, or adapters get no gradient through a frozen input."""
    plain = run(tmp_path / "a", peft_config=peft_config)
    recomputed = run(tmp_path / "b", peft_config=peft_config, gradient_checkpointing=True)
    assert losses(recomputed) == pytest.approx(losses(plain), abs=1e-5)
    assert largest_difference(trained(plain), trained(recomputed)) < 1e-4


def test_bfloat16_stays_near_float32(tmp_path):
    """Fault: guidance or the divergence in half precision, which it amplifies."""
    exact, rounded = run(tmp_path / "a", max_steps=1), run(tmp_path / "b", max_steps=1, bf16=True)
    logs = [trainer.state.log_history[0] for trainer in (exact, rounded)]
    assert logs[0]["kl/clip"] != logs[1]["kl/clip"]
    assert logs[1]["kl/clip"] == pytest.approx(logs[0]["kl/clip"], rel=0.05)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("reward", ["codes", "waves"])
def test_stereo_trains(tmp_path, reward):
    """Fault: delays of eight codebooks taken for mono ones; or both channels' audio taken for two clips."""
    reward = DiversityReward(WaveEmbedder()) if reward == "waves" else reward
    trainer = run(tmp_path, model=tiny_musicgen(audio_channels=2), max_steps=2, reward=reward)
    assert len(losses(trainer)) == 2 and "kl/codebook_7" in trainer.state.log_history[0]
