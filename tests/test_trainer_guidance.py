"""One student for a range of γ: each prompt draws its own, the teacher uses it, the student is told it."""

import hashlib

import pytest
import torch
from peft import LoraConfig

from diverse_cfg.functional.distillation import distillation_loss
from diverse_cfg.functional.guidance import GuidanceRange
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import code_logits
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.policies.shift import SHIFT_FILE, read_shift
from diverse_cfg.provenance import read_provenance
from diverse_cfg.trainer import CFGDiversityTrainer
from diverse_cfg.trainer.setup import draw_guidance
from tests import toy
from tests.tiny import PROMPTS, save_tiny, tiny_musicgen, tiny_processor
from tests.training import largest_difference, losses, tiny_args, tiny_trainer, trained

RANGE = {"low": 1, "high": 5}
LORA = LoraConfig(r=2, lora_alpha=4)
BOTH = pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
KL = {"reward": None, "diversity_coef": 0.0}


def test_draws_of_a_step_are_spread_and_each_is_uniform():
    """Parts of a rollout are the whole's, whichever process has them. Fault: all prompts of a step at one end."""
    guidance = GuidanceRange.of(RANGE)
    steps = torch.tensor([draw_guidance(guidance, seed, 0, 24, 2) for seed in range(2000)])
    assert torch.equal(steps[:, 0::2], steps[:, 1::2])
    assert draw_guidance(guidance, 7, 8, 4, 2) == pytest.approx(steps[7, 8:12].tolist())
    assert (steps[:, 5].sort().values - torch.linspace(1, 5, 2000)).abs().max() < 0.15
    prompts = steps[:, 0::2].sort(dim=1).values
    assert (prompts[:, 1:] - prompts[:, :-1]).max() < 0.9, "12 prompts leave no gap of a quarter of the range"
    listed = torch.tensor(draw_guidance(GuidanceRange.of([1, 2, 5]), 3, 0, 999, 1))
    assert all(330 < (listed == value).sum() < 336 for value in (1, 2, 5))


def spy_on_rollouts(trainer):
    """γ of every rollout, as it is drawn."""
    drawn, roll_out = [], trainer._roll_out

    def noted(rows):
        clips = roll_out(rows)
        drawn.append((clips.prompts, clips.seed, clips.condition.guidance))
        return clips

    trainer._roll_out = noted
    return drawn


def test_a_prompt_draws_its_own(tmp_path):
    """Keyed by (run seed, step, prompt), shared by a prompt's clips. Fault: one γ for all, another for each clip, or
    one that depends on the global random state or on the batch."""
    drawn = []
    for name, settings in (("a", {}), ("b", {}), ("other seed", {"seed": 1})):
        trainer = tiny_trainer(tmp_path / name, guidance_scale=RANGE, max_steps=2, **settings)
        seen = spy_on_rollouts(trainer)
        torch.rand(len(name))
        trainer.train()
        drawn.append(torch.stack([guidance for _, _, guidance in seen]))
        for prompts, seed, guidance in seen:
            assert len(prompts) == len(guidance) == 8
            digest = hashlib.blake2b(f"{seed}/guidance".encode(), digest_size=6).digest()
            start = int.from_bytes(digest, "big") / 2**48
            for row, prompt in enumerate([0, 0, 0, 0, 1, 1, 1, 1]):
                assert guidance[row] == pytest.approx(1 + 4 * ((start + prompt * 0.6180339887) % 1))
    assert torch.equal(drawn[0], drawn[1])
    assert len(drawn[0].unique()) == len(drawn[0]) * 2
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("schedule", ["constant", "linear", "interval 0.3 0.8"])
def test_the_teacher_of_a_row_has_its_guidance(tmp_path, schedule):
    """Divergences against logits that are guided row by row. Fault: another row's γ, or the reference for all."""
    trainer = tiny_trainer(tmp_path, guidance_scale=RANGE, guidance_schedule=schedule, **KL)
    policy, frames = trainer._policy, trainer._num_frames
    codes = torch.randint(16, (4, 4, frames), generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([1.0, 2.0, 3.0, 4.5])
    told = policy.encode_text(PROMPTS).told(scales)
    hidden = policy.hidden_states(codes, told).detach()
    found = distillation_loss(
        hidden, policy.head_weights().detach(), codes, trainer._teacher(codes, told), delays=policy.delays
    ).divergences
    base = tiny_musicgen()
    cond, null = code_logits(base, codes, told.told(None)), code_logits(base, codes, None)
    student = policy.code_logits(codes, told).detach().log_softmax(-1)
    place = torch.arange(frames) / (frames - 1)
    share = {"constant": torch.ones(frames), "linear": 1 - place}.get(
        schedule, (place >= 0.3) & (place <= 0.8)
    )
    scale = 1 + (scales[:, None, None, None] - 1) * share[:, None].float()
    teacher = (null + scale * (cond - null)).log_softmax(-1)
    wanted = (student.exp() * (student - teacher)).sum(-1).detach()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@BOTH
def test_it_learns_what_it_is_told(tmp_path, peft_config):
    """After a short run the divergence is lower with the γ of a clip than with another's. Fault: a table that nothing
    reads, or that no optimizer moves."""
    trainer = tiny_trainer(
        tmp_path, guidance_scale=[1, 5], max_steps=30, learning_rate=2e-2, peft_config=peft_config, **KL
    )
    trainer.train()
    policy, teacher = trainer._policy, trainer._teacher
    condition = policy.encode_text(PROMPTS * 4).told(torch.tensor([1.0, 5.0] * 8))
    codes = policy.sample(condition, trainer._num_frames, seed=1).codes
    found = teacher(codes, condition)

    def divergence(told):
        with torch.no_grad():
            hidden = policy.hidden_states(codes, condition.told(told))
            return distillation_loss(
                hidden, policy.head_weights(), codes, found, delays=policy.delays
            ).divergences.mean()

    right, none, wrong = map(divergence, (condition.guidance, None, 6 - condition.guidance))
    assert right < 0.95 * none
    assert none < wrong


@BOTH
@pytest.mark.parametrize("source", ["student", "mix"])
def test_a_killed_run_goes_on_with_its_table(tmp_path, peft_config, source):
    """With averaged weights, clips used twice, and the best model loaded in the end."""
    settings = {
        "guidance_scale": RANGE,
        "ema_decay": 0.8,
        "num_iterations": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "peft_config": peft_config,
        "rollout_source": source,
    }
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    again = tiny_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert largest_difference(trained(whole), trained(again)) == 0
    assert losses(again)[-1] == losses(whole)[-1]
    assert any("guidance_shift" in name for name in trained(whole))
    shift = read_shift(tmp_path / "whole" / "checkpoint-4")
    assert shift.table.abs().max() > 0
    (tmp_path / "whole" / "checkpoint-3" / SHIFT_FILE).unlink()
    with pytest.raises(ValueError, match=f"{SHIFT_FILE} is missing"):
        tiny_trainer(tmp_path / "b", **settings).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
        )


def test_the_best_model_has_its_own_table(tmp_path):
    """Fault: the best weights with the last table."""
    args = tiny_args(
        tmp_path,
        guidance_scale=RANGE,
        diversity_coef=0.0,
        max_steps=3,
        learning_rate=0.3,  # each step is worse
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        per_device_eval_batch_size=8,
    )
    trainer = CFGDiversityTrainer(
        tiny_musicgen(), None, args, PROMPTS, eval_dataset=PROMPTS[:2], processing_class=tiny_processor()
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-3")
    assert torch.equal(trainer._policy.shift.table.detach(), read_shift(best).table)


@BOTH
def test_what_is_saved(tmp_path, peft_config):
    """The folder plays γ = 3 wherever it is loaded and tells its range; a run may go on from it."""
    base = save_tiny(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "student", base, guidance_scale=RANGE, peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    provenance = read_provenance(tmp_path / "student")
    assert (provenance.guidance_scale, provenance.guidance_range) == (3.0, [1.0, 5.0])
    loaded = as_policy(load_policy(tmp_path / "student"), tiny_processor())
    condition = loaded.encode_text(PROMPTS)
    codes = torch.zeros(4, 4, 6, dtype=torch.long)
    for told in (1.7, 3.0, None):
        ours = trainer._policy.code_logits(codes, condition.told(told))
        torch.testing.assert_close(
            loaded.code_logits(codes, condition.told(told)), ours, atol=1e-5, rtol=1e-5
        )
    more = {"teacher_model": base, "peft_config": peft_config, "max_steps": 1}
    student = str(tmp_path / "student")
    again = tiny_trainer(tmp_path / "more", student, guidance_scale=RANGE, **more)
    assert torch.equal(again._policy.shift.table.detach(), loaded.shift.table)
    again.train()
    again.save_model()
    assert not torch.equal(read_shift(tmp_path / "more").table, loaded.shift.table)
    for other in (3.0, {"low": 1, "high": 4}):
        with pytest.raises(ValueError, match=r"from 1 to 5.*--bake-guidance"):
            tiny_trainer(tmp_path / "wrong", student, guidance_scale=other, **more)


def test_settings(tmp_path):
    for value in ({"low": 5, "high": 1}, [3], "wide", "{low: 1}", [0.5, 2]):
        with pytest.raises(ValueError, match=r"guidance_scale=.*\{low: 1, high: 5\}"):
            tiny_args(tmp_path, guidance_scale=value)
    assert tiny_args(tmp_path, guidance_scale="{low: 1, high: 5}").guidance_scale == RANGE
    assert tiny_args(tmp_path, guidance_scale="2.5").guidance_scale == 2.5
    with pytest.raises(ValueError, match="toy-letters"):
        tiny_trainer(tmp_path, toy.toy_folder(tmp_path / "toy"), guidance_scale=RANGE, **KL)
