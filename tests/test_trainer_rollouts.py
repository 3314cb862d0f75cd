"""The trainer's clips come from the student as it is now, through one fused copy that is kept."""

import math

import pytest
import torch
from peft import LoraConfig

from diverse_cfg.musicgen.decoders import EagerDecoder
from diverse_cfg.musicgen.loop import DecodeLoop
from diverse_cfg.musicgen.policy import encode_text, unwrap
from diverse_cfg.musicgen.rollout import RolloutWeights, sample_codes
from tests.tiny import PROMPTS, tiny_processor
from tests.training import tiny_trainer

LORA = LoraConfig(r=2, lora_alpha=4)


def play(trainer, is_teacher=False):
    """Four clips through the trainer's own seam."""
    condition = encode_text(unwrap(trainer.model), tiny_processor(), PROMPTS)
    return trainer._sample(condition, torch.arange(4), 3, is_teacher)


def fresh(trainer, **settings):
    """The same clips from a copy that is made now."""
    model = unwrap(trainer.model)
    condition = encode_text(model, tiny_processor(), PROMPTS)
    weights = RolloutWeights.from_model(model)
    return sample_codes(model, condition, trainer._num_frames, seed=3, weights=weights, **settings).codes


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_clips_follow_the_student_and_not_the_teacher(tmp_path, peft_config):
    """Faults: the fused copy is built anew for every rollout, or is never refreshed; a teacher that moves."""
    trainer = tiny_trainer(tmp_path, peft_config=peft_config, learning_rate=0.1)
    before, teacher = play(trainer), play(trainer, is_teacher=True)
    assert torch.equal(before, fresh(trainer))
    assert torch.equal(teacher, fresh(trainer, guidance_scale=3.0))
    kept = dict(trainer._fused_weights)
    trainer.train()
    after = play(trainer)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(trainer))
    assert torch.equal(play(trainer, is_teacher=True), teacher)
    assert not torch.equal(teacher, fresh(trainer, guidance_scale=3.0))
    assert trainer._fused_weights[False] is kept[False] and trainer._fused_weights[True] is kept[True]


def test_an_update_does_not_reach_into_a_running_rollout(tmp_path, monkeypatch):
    """Fault: the fused copy shares a tensor with the student, whose optimizer writes in place."""
    trainer = tiny_trainer(tmp_path)
    expected, step = play(trainer), EagerDecoder.step

    def interfering(decoder, ids, index):
        if index == 4:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(1.0)
        return step(decoder, ids, index)

    monkeypatch.setattr(EagerDecoder, "step", interfering)
    assert torch.equal(play(trainer), expected)
    monkeypatch.undo()
    assert not torch.equal(play(trainer), expected)


def test_a_prompt_that_breaks_is_named_with_its_step(tmp_path):
    trainer = tiny_trainer(tmp_path, num_train_epochs=1)
    with torch.no_grad():
        cello = tiny_processor().tokenizer("cello").input_ids[0]
        unwrap(trainer.model).text_encoder.shared.weight[cello] = math.inf
    with pytest.raises(FloatingPointError, match="clip of prompt 'sad cello' are not finite at step 0"):
        trainer.train()


def test_training_goes_on_with_smaller_rollouts_when_memory_runs_out(tmp_path, monkeypatch, caplog):
    """The clips are the same, and the failure is met once and not in every step."""
    straight = tiny_trainer(tmp_path / "a")
    straight.train()
    run, sizes = DecodeLoop.run, []

    def limited(loop, noise):
        sizes.append(len(noise))
        if len(noise) > 4 and loop.num_frames == trainer._num_frames:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(loop, noise)

    trainer = tiny_trainer(tmp_path / "b")
    monkeypatch.setattr(DecodeLoop, "run", limited)
    trainer.train()
    assert [entry.get("loss") for entry in trainer.state.log_history] == pytest.approx(
        [entry.get("loss") for entry in straight.state.log_history], abs=1e-6
    )
    assert caplog.text.count("going on with 4 clips at once") == 1
    assert sizes.count(8) <= 3 and sizes[-6:] == [4] * 6  # eight twice for the estimate, once for the failure
