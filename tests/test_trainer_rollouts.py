"""The trainer's clips come from the student as it is now, through one fused copy that is kept."""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from diverse_cfg.policies.musicgen.model import encode_text, unwrap
from diverse_cfg.policies.sampler.decoders import EagerDecoder
from diverse_cfg.policies.sampler.loop import DecodeLoop
from diverse_cfg.policies.sampler.rollout import RolloutWeights, sample_codes
from diverse_cfg.trainer import teacher as teacher_module
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor
from tests.training import losses, tiny_args, tiny_trainer

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
    kept = dict(trainer._sample.weights)
    trainer.train()
    after = play(trainer)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(trainer))
    assert torch.equal(play(trainer, is_teacher=True), teacher)
    assert not torch.equal(teacher, fresh(trainer, guidance_scale=3.0))
    assert trainer._sample.weights[False] is kept[False] and trainer._sample.weights[True] is kept[True]


@pytest.mark.parametrize("is_teacher", [False, True])
def test_clips_are_sampled_at_the_temperature_of_the_loss(tmp_path, is_teacher):
    """Fault: a policy gradient and divergences at one temperature, on clips of another."""
    trainer = tiny_trainer(tmp_path, temperature=0.5)
    assert trainer._loss_settings.temperature == 0.5
    guidance = {"guidance_scale": 3.0} if is_teacher else {}
    found = play(trainer, is_teacher)
    assert torch.equal(found, fresh(trainer, temperature=0.5, **guidance))
    assert not torch.equal(found, fresh(trainer, temperature=1.0, **guidance))


def test_the_teachers_clips_avoid_the_negative_prompt(tmp_path):
    """Fault: the teacher that samples is another than the one that is distilled."""
    negative = "sad cello song in the key of g minor"
    trainer = tiny_trainer(tmp_path, negative_prompt=negative)
    avoided = encode_text(unwrap(trainer.model), tiny_processor(), [negative] * len(PROMPTS))
    found = play(trainer, is_teacher=True)
    assert torch.equal(found, fresh(trainer, guidance_scale=3.0, negative_condition=avoided))
    assert not torch.equal(found, fresh(trainer, guidance_scale=3.0))


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

    def limited(loop, noise, *_):
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


SETTINGS = {
    "student": {},
    "teacher": {"rollout_source": "teacher", "diversity_coef": 0.0},
    "mix, negative prompt": {"rollout_source": "mix", "negative_prompt": "sad"},
    "lora, mix": {"rollout_source": "mix", "peft_config": LORA},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "stereo": {"model": 2},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_both_backends_train_alike(tmp_path, monkeypatch, case):
    """Faults: the reference plays another policy (adapters, guidance, an old student), or inherits settings of
    the checkpoint; a fused copy is built although nothing samples from it."""
    settings = SETTINGS[case] | {"max_steps": 1}

    def trainer(backend):
        model = tiny_musicgen(SETTINGS[case].get("model", 1))
        return tiny_trainer(tmp_path, **settings | {"model": model}, rollout_backend=backend)

    fast = trainer("fast")
    before = [play(fast, is_teacher) for is_teacher in (False, True)]
    fast.train()
    reference = trainer("transformers")
    monkeypatch.setattr(RolloutWeights, "from_model", None)
    assert all(torch.equal(play(reference, i), clips) for i, clips in enumerate(before))
    reference.train()
    assert losses(reference) == pytest.approx(losses(fast), abs=1e-5)
    assert torch.equal(play(reference), play(fast)) and not torch.equal(play(fast), before[0])
    assert not reference._sample.weights


def test_the_reference_computes_in_the_runs_dtype(tmp_path):
    """Fault: stock rollouts in float32 for a student that is trained in bfloat16."""
    trainer, seen = tiny_trainer(tmp_path, rollout_backend="transformers", bf16=True), set()
    unwrap(trainer.model).decoder.lm_heads[0].register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    play(trainer)
    assert seen == {torch.bfloat16}


def test_an_unknown_backend_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="rollout_backend='vllm' must be one of fast, transformers"):
        tiny_args(tmp_path, rollout_backend="vllm")


def test_a_model_that_the_loop_refuses_trains_with_the_reference(tmp_path):
    """Fault: the remedy that the refusal names is not there."""
    AttentionInterface.register("own_attention", sdpa_attention_forward)
    AttentionMaskInterface.register("own_attention", sdpa_mask)

    def train(backend, attention):
        trainer = tiny_trainer(tmp_path, max_steps=1, rollout_backend=backend)
        unwrap(trainer.model).decoder.set_attn_implementation(attention)
        trainer.train()
        return losses(trainer)

    with pytest.raises(ValueError, match=r"own_attention.*use rollout_backend='transformers'"):
        train("fast", "own_attention")
    assert train("transformers", "own_attention") == pytest.approx(train("fast", "sdpa"), abs=1e-5)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("source", ["student", "teacher", "mix"])
def test_every_process_gathers_the_weights_as_often(tmp_path, monkeypatch, source, peft_config):
    """Faults: a process without clips of the teacher (or of the student) skips a gathering that the others wait
    in, for ever; weights are gathered for a teacher's copy that is there already."""
    coef = 0.0 if source == "teacher" else 5.0
    whole, gathered = teacher_module.whole_weights, []

    def gathering(model):
        gathered.append(model)
        return whole(model)

    def gatherings(teacher_rows):
        trainer = tiny_trainer(tmp_path, rollout_source=source, diversity_coef=coef, peft_config=peft_config)
        if source == "mix":
            trainer._teacher_rows = lambda rows: torch.tensor(teacher_rows.pop(0) * 4).repeat(rows // 4)
        trainer.model.train()
        counts = []
        for _ in range(3):
            gathered.clear()
            trainer._roll_out([{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)])
            assert all(model is trainer.model_wrapped for model in gathered)
            counts.append(len(gathered))
        return counts

    monkeypatch.setattr(teacher_module, "whole_weights", gathering)
    expected = {"student": [1, 1, 1], "teacher": [1, 0, 0], "mix": [2, 1, 1]}[source]
    assert gatherings([[False], [True], [False]]) == expected
    assert gatherings([[True], [False], [False]]) == expected
