"""The trainer around its objective: teacher, rewards, evaluation, what is saved, and what is refused."""

import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, MusicgenForConditionalGeneration, pipeline

from diverse_cfg.callbacks import RewardHackingAlarm
from diverse_cfg.config import GuardConfig
from diverse_cfg.functional.guidance import guided_logits
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import code_logits, encode_text
from diverse_cfg.policies.sampler.rollout import sample_codes
from diverse_cfg.provenance import Provenance, read_provenance, write_provenance
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer
from diverse_cfg.trainer.advantages import Advantages
from diverse_cfg.trainer.objective import student_terms
from diverse_cfg.types import Clips
from tests.checkpoints import make_adapter
from tests.faults import held
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor
from tests.training import CodeEmbedder, WaveEmbedder, losses, tiny_args, tiny_trainer

LORA = LoraConfig(r=2, lora_alpha=4)
TRL = tuple(int(part) for part in version("trl").split(".")[:2])


def reward_of_length(completions, **_):
    return [float(len(clip)) for clip in completions]


# ---- teacher -------------------------------------------------------------------------------------------


def teacher_logits(trainer, codes, condition):
    """Guided logits [N, K, T, V] from the hidden states that the loss gets."""
    teacher = trainer._teacher(codes, condition)
    guided = teacher.uncond_hidden_states + teacher.guidance_scale * (
        teacher.cond_hidden_states - teacher.uncond_hidden_states
    )
    frames = codes.shape[2]
    cells = [guided[:, k : k + frames] @ teacher.head_weights[k].T for k in range(codes.shape[1])]
    return torch.stack(cells, dim=1)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_teacher_is_the_guided_generation_of_the_base(tmp_path, peft_config):
    """Fault: adapters that stay on, null rows without their mask, or guidance applied the other way round."""
    base = tiny_musicgen()
    trainer = tiny_trainer(tmp_path, peft_config=peft_config)
    trainer.train()  # the student has moved away
    frames = trainer._num_frames
    inputs = tiny_processor()(text=PROMPTS, padding=True, return_tensors="pt")
    played = []
    decode = base.audio_encoder.decode
    base.audio_encoder.decode = lambda codes, *args, **kw: (
        played.append(codes[0]) or decode(codes, *args, **kw)
    )
    result = base.generate(
        **inputs,
        do_sample=False,
        guidance_scale=3.0,
        max_new_tokens=frames + 3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    codes = played[0]
    assert codes.shape == (len(PROMPTS), 4, frames)
    scores = torch.stack(result.scores, dim=1).unflatten(0, (len(PROMPTS), 4))  # [N, K, S, V]
    wanted = torch.stack([scores[:, k, k : k + frames] for k in range(4)], dim=1)
    found = teacher_logits(trainer, codes, encode_text(base, tiny_processor(), PROMPTS))
    assert (found - wanted).abs().max().item() < 1e-5


def test_negative_prompt_takes_the_place_of_the_null_prompt(tmp_path):
    """Fault: the negative prompt is ignored, or its padding is attended to."""
    trainer = tiny_trainer(tmp_path, negative_prompt="sad cello song in the key of g minor")
    base = tiny_musicgen()
    condition = encode_text(base, tiny_processor(), PROMPTS)
    negative = encode_text(base, tiny_processor(), ["sad cello song in the key of g minor"] * len(PROMPTS))
    codes = torch.randint(0, 16, (len(PROMPTS), 4, 7), generator=torch.Generator().manual_seed(3))
    cond, uncond = code_logits(base, codes, condition), code_logits(base, codes, negative)
    found = teacher_logits(trainer, codes, condition)
    assert (found - guided_logits(cond, uncond, 3.0)).abs().max().item() < 1e-5


def test_a_schedule_guides_the_teacher_and_its_clips_frame_by_frame(tmp_path):
    """Faults: the schedule reaches the loss only, or the teacher's clips only, or the first frames get the last γ."""
    trainer = tiny_trainer(tmp_path, guidance_schedule="interval 0.5 1", rollout_source="mix")
    frames = trainer._num_frames
    scale = torch.tensor([1.0] * (frames // 2) + [3.0] * (frames - frames // 2))
    base = tiny_musicgen()
    condition = encode_text(base, tiny_processor(), PROMPTS)
    codes = trainer._sample(condition, torch.arange(len(PROMPTS)), 3, True)
    assert torch.equal(
        codes, sample_codes(base, condition, frames, guidance_scale=tuple(scale.tolist()), seed=3).codes
    )
    cond, uncond = (code_logits(base, codes, rows) for rows in (condition, condition.null()))
    teacher = trainer._teacher(codes, condition)
    terms, _ = student_terms(
        trainer._policy, Clips(codes, 3200, condition=condition), trainer._loss_settings, teacher
    )
    student, guided = cond.log_softmax(-1), guided_logits(cond, uncond, scale).log_softmax(-1)
    wanted = (student.exp() * (student - guided)).sum(-1)
    torch.testing.assert_close(terms.divergences, wanted, atol=1e-5, rtol=1e-4)
    assert wanted[..., : frames // 2].abs().max() < 1e-5 < wanted[..., frames // 2 :].mean()
    trainer.train()
    assert trainer._provenance().training["guidance_schedule"] == "interval 0.5 1"


def test_another_teacher_than_the_start(tmp_path, tiny_folder):
    """Fault: a run that continues a student takes the student itself for its teacher."""
    trainer = tiny_trainer(tmp_path, model=tiny_musicgen(), teacher_model=tiny_folder)
    with torch.no_grad():
        trainer.model.decoder.lm_heads[0].weight.mul_(2)
    assert not trainer._teacher.shares_weights
    base = load_policy(tiny_folder)
    assert torch.equal(
        trainer._teacher.policy.model.decoder.lm_heads[0].weight, base.decoder.lm_heads[0].weight
    )
    assert trainer._teacher.policy.model.audio_encoder is trainer.model.audio_encoder


def test_teacher_of_another_base_is_refused(tmp_path, tiny_folder):
    with pytest.raises(ValueError, match="teacher_model has another text_encoder"):
        tiny_trainer(tmp_path, model=tiny_musicgen(seed=7), teacher_model=tiny_folder)


# ---- rewards -------------------------------------------------------------------------------------------


def test_reward_functions_get_audio_groups_and_columns(tmp_path):
    """Fault: a custom reward sees texts, codes, or the wrong group size."""
    seen = []

    def custom(prompts, completions, num_generations, sampling_rate, codes, style, **_):
        seen.append((prompts, [tuple(c.shape) for c in completions], num_generations, sampling_rate, style))
        return [0.1 * row for row in range(len(prompts))]

    trainer = CFGDiversityTrainer(
        tiny_musicgen(),
        [DiversityReward(WaveEmbedder()), custom],
        tiny_args(tmp_path, max_steps=1, reward_weights=[1.0, 0.5]),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "style": ["x"] * len(PROMPTS)}),
        processing_class=tiny_processor(),
    )
    trainer.train()
    prompts, shapes, group, rate, style = seen[0]
    assert (len(prompts), group, rate, style) == (8, 4, 3200, ["x"] * 8)
    assert len(set(prompts[:4])) == 1 and prompts[0] != prompts[4]
    assert shapes == [(trainer._num_frames * 64,)] * 8


def test_async_rewards_and_missing_rewards(tmp_path):
    """Fault: a coroutine taken for a list; None taken for 0."""

    async def sometimes(completions, **_):
        return [None if row % 2 else float(row) for row in range(len(completions))]

    trainer = tiny_trainer(tmp_path, reward=sometimes, diversity_coef=0.0, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/sometimes/mean"] == 3.0 and math.isfinite(log["loss"])


def test_own_rewards_use_the_ordinary_baseline(tmp_path):
    """Fault: the pairwise correction on a reward that is not pairwise."""
    trainer = tiny_trainer(tmp_path, reward=[DiversityReward(CodeEmbedder()), reward_of_length])
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 6.0]])
    codes = torch.zeros(4, 4, 7, dtype=torch.long)
    found, _ = trainer._advantages(rewards, codes, 4, torch.zeros(4, dtype=torch.bool), None)
    wanted = torch.tensor([1 - 11 / 3, 2 - 10 / 3, 3 - 3.0, 6 - 2.0])
    torch.testing.assert_close(found, wanted[:, None, None].expand_as(found))


def test_leading_codebooks_of_both_channels(tmp_path):
    """Fault: a stereo model whose left channel alone is reached; or another reward that is cut as well."""
    args = tiny_args(tmp_path, diversity_codebooks=2, diversity_coef=3.0)
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [6.0, 6.0]])
    codes = torch.zeros(4, 8, 7, dtype=torch.long)
    functions, weights = [DiversityReward(CodeEmbedder()), reward_of_length], torch.ones(2)
    found, _ = Advantages(args, functions, weights, delays=(0, 0, 1, 1, 2, 2, 3, 3))(
        rewards, codes, 4, torch.zeros(4, dtype=torch.bool), None
    )
    other, diverse = 6 - 2.0, 3 * 2 * 4 / 2 * (6 - 1.5)
    assert found[3, :, 0].tolist() == pytest.approx([other + diverse] * 4 + [other] * 4)


def test_more_codebooks_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="diversity_codebooks=5, but the model has 4 codebooks per channel"):
        tiny_trainer(tmp_path, diversity_codebooks=5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_reward_is_named(tmp_path, value):
    """Fault: TRL drops NaN when another reward is finite, and trains on."""

    def broken(completions, **_):
        return [0.0] * 5 + [value] + [0.0] * (len(completions) - 6)

    trainer = tiny_trainer(tmp_path, reward=[DiversityReward(CodeEmbedder()), broken])
    with pytest.raises(ValueError, match=r"'broken' returned (nan|inf) for clip 5 \(prompt"):
        trainer.train()


def test_no_reward_at_all_is_pure_distillation(tmp_path):
    trainer = tiny_trainer(tmp_path, reward=None, diversity_coef=0.0)
    trainer.train()
    assert trainer.reward_funcs == [] and len(losses(trainer)) == 3


def test_a_guard_that_listens_goes_with_a_prefix_baseline_of_codes(tmp_path):
    """Fault: the guard needs audio, so that an encoder of codes was handed decoded prefixes."""
    reward = DiversityReward(CodeEmbedder(), GuardConfig(max_silence=1.0))
    tiny_trainer(tmp_path, reward=reward, max_steps=1, prefix_baseline=True).train()


def test_terms_and_times_are_logged(tmp_path):
    """Fault: a metric of recipes/README.md that is not there."""
    trainer = tiny_trainer(tmp_path, term_norm_steps=2, max_steps=3, prefix_baseline=True)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    wanted = ["loss/distillation", "loss/policy_gradient", "kl/clip", "kl/codebook_3", "entropy/codebook_0"]
    wanted += ["reward/diversity", "reward/diversity_variance", "time/rollout", "time/reward", "time/teacher"]
    wanted += ["time/student", "time/update", "grad_norm/distillation", "grad_norm/policy_gradient"]
    assert not [name for name in wanted if not math.isfinite(first.get(name, math.nan))]
    assert any(name.startswith("prefix_baseline/explained_variance") for name in second)
    assert "grad_norm/cosine" in first and "grad_norm/cosine" not in second
    # The two gradients add up to the one that was applied.
    a, b, cosine = (first[f"grad_norm/{n}"] for n in ("distillation", "policy_gradient", "cosine"))
    assert first["grad_norm"] == pytest.approx(math.sqrt(a * a + b * b + 2 * a * b * cosine), rel=1e-4)


def test_silent_audio_is_named(tmp_path):
    """Fault: a clip without a direction gets a reward of NaN or 0, and the run goes on."""

    class Silent(WaveEmbedder):
        def embed(self, inputs, sampling_rate=None):
            return super().embed(inputs, sampling_rate) * 0

    trainer = tiny_trainer(tmp_path, reward=DiversityReward(Silent()))
    with pytest.raises(ValueError, match="silent"):
        trainer.train()


@pytest.mark.skipif(TRL < (1, 9), reason="TRL refuses streams before 1.9")
def test_a_stream_of_prompts_trains(tmp_path):
    """Fault: something asks a streaming dataset for its length."""
    stream = Dataset.from_dict({"prompt": PROMPTS * 2}).to_iterable_dataset()
    trainer = CFGDiversityTrainer(
        tiny_musicgen(),
        DiversityReward(CodeEmbedder()),
        tiny_args(tmp_path, max_steps=2),
        train_dataset=stream,
        processing_class=tiny_processor(),
    )
    trainer.train()
    assert len(losses(trainer)) == 2


# ---- evaluation ----------------------------------------------------------------------------------------


def test_evaluation_hears_the_same_noise_and_keeps_audio(tmp_path, tiny_folder):
    """Fault: an evaluation differs by its luck; or it disturbs the training run."""

    def run(folder, **settings):
        trainer = CFGDiversityTrainer(
            tiny_folder,
            DiversityReward(CodeEmbedder()),
            tiny_args(folder, per_device_eval_batch_size=8, **settings),
            train_dataset=PROMPTS,
            eval_dataset=PROMPTS[:2],
        )
        first = trainer.evaluate()
        assert trainer.evaluate()["eval_kl/clip"] == first["eval_kl/clip"]
        trainer.train()
        return trainer

    watched = run(tmp_path / "a", eval_strategy="steps", eval_steps=1, audio_samples=2)
    assert losses(watched) == losses(run(tmp_path / "b"))
    files = sorted(path.name for path in (tmp_path / "a" / "audio" / "step-000002").iterdir())
    assert len(files) == 2 and files[0].startswith("00-")


# ---- saving --------------------------------------------------------------------------------------------


def test_a_saved_student_is_played_by_plain_transformers(tmp_path, tiny_folder):
    """Fault: T5's token ids or the base's guidance of 3 in the saved folder, or a missing processor."""
    trainer = CFGDiversityTrainer(
        tiny_folder, DiversityReward(CodeEmbedder()), tiny_args(tmp_path / "run"), train_dataset=PROMPTS
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    saved = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert saved["guidance_scale"] == 1.0 and saved["max_new_tokens"] == trainer._num_frames + 3
    assert [saved[key] for key in ("pad_token_id", "bos_token_id", "decoder_start_token_id")] == [16] * 3
    assert (saved["temperature"], saved["top_k"]) == (1.0, 0)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["model_type"] == "musicgen" and config["decoder"]["pad_token_id"] == 16
    assert not list((tmp_path / "student").glob("*.bin"))
    again = MusicgenForConditionalGeneration.from_pretrained(tmp_path / "student")
    weights, kept = again.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(weights[name], kept[name].to(weights[name].dtype)) for name in weights)
    rows = []
    again.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    play = pipeline(
        "text-to-audio",
        model=again,
        processor=None,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "student"),
    )
    audio = play(PROMPTS[0])["audio"]
    assert audio.shape[-1] == trainer._num_frames * 64
    assert set(rows) == {4}  # one row per codebook: no second, unconditional half
    provenance = read_provenance(tmp_path / "student")
    assert (provenance.kind, provenance.base_model, provenance.guidance_scale) == (
        "student",
        tiny_folder,
        3.0,
    )
    assert provenance.sampling["num_frames"] == trainer._num_frames


def test_a_saved_adapter_loads_without_double_guidance(tmp_path, tiny_folder):
    """Fault: an adapter's folder inherits guidance 3.0 from its base."""
    trainer = CFGDiversityTrainer(
        tiny_folder,
        DiversityReward(CodeEmbedder()),
        tiny_args(tmp_path / "run"),
        train_dataset=PROMPTS,
        peft_config=LORA,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "generation_config.json", "diverse_cfg.json"} <= names
    assert "model.safetensors" not in names
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "**Pass `guidance_scale=1.0`" in card.split("\n---\n")[1][:300]  # others take the base's
    policy = load_policy(tmp_path / "adapter")
    assert policy.generation_config.guidance_scale == 1.0
    condition = encode_text(policy, tiny_processor(), PROMPTS)
    codes = torch.randint(0, 16, (4, 4, 7), generator=torch.Generator().manual_seed(0))
    kept = code_logits(trainer.model, codes, condition)
    torch.testing.assert_close(code_logits(policy, codes, condition), kept, atol=1e-5, rtol=0)


def test_adapters_touch_the_decoder_only(tmp_path):
    """Fault: LoRA on T5 (frozen for the rollout) or on the heads (which the loss reads directly)."""
    trainer = tiny_trainer(tmp_path, peft_config=LORA)
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert names and all(".decoder.model." in name and ".lora_" in name for name in names)


# ---- refused before the first step ---------------------------------------------------------------------


def test_ready_made_peft_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ready-made PeftModel"):
        tiny_trainer(tmp_path, model=get_peft_model(tiny_musicgen(), LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": "all-linear"}, "all-linear"),
        (
            {"target_modules": ["q_proj", "conv"]},
            r"\(lora_target_modules\) names 'conv', which is not a linear",
        ),
        ({"target_modules": ["nothing"]}, "names 'nothing', which is not a linear layer of the model: leave"),
        ({"lora_alpha": 0}, "lora_alpha=0: the adapter would change nothing"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
    ],
)
def test_adapters_that_cannot_be_trusted_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, **settings))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "train_dataset is required"),
        ([], "no prompts|empty|no rows"),
        (Dataset.from_dict({"caption": ["a song"]}), "caption|column"),
        (["a song", " "], "prompt"),
        (["one song"], "train_dataset has 1 prompts"),
    ],
)
def test_unusable_prompts_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        CFGDiversityTrainer(
            tiny_musicgen(),
            DiversityReward(CodeEmbedder()),
            tiny_args(tmp_path),
            train_dataset=data,
            processing_class=tiny_processor(),
        )


def test_prompts_longer_than_the_encoder_are_refused(tmp_path):
    processor = tiny_processor()
    processor.tokenizer.model_max_length = 6
    with pytest.raises(ValueError, match=r"prompt 1 has .* tokens, the text encoder takes 6"):
        CFGDiversityTrainer(
            tiny_musicgen(),
            DiversityReward(CodeEmbedder()),
            tiny_args(tmp_path),
            train_dataset=["sad cello", "a calm fast slow happy sad piano flute cello drum song"],
            processing_class=processor,
        )


@pytest.mark.parametrize("reward", ["some/reward-model", torch.nn.Linear(2, 2)])
def test_text_reward_models_are_refused(tmp_path, reward):
    with pytest.raises(ValueError, match="text reward model"):
        tiny_trainer(tmp_path, reward=[reward])


def test_diversity_without_its_reward_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no reward function measures diversity"):
        tiny_trainer(tmp_path, reward=reward_of_length)


def test_the_diversity_reward_has_no_second_weight(tmp_path):
    with pytest.raises(ValueError, match="diversity_coef, keep 1"):
        tiny_trainer(tmp_path, reward_weights=[2.0])


@pytest.mark.parametrize(
    ("rate", "message"), [(16_000, "at 16000 Hz, the model's is at 3200"), (None, "None")]
)
def test_an_encoder_of_another_codec_is_refused(tmp_path, rate, message):
    """Fault: codes of one codec looked up in the tables of another; the distances mean nothing."""
    embedder = CodeEmbedder()
    embedder.sampling_rate = rate
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, reward=DiversityReward(embedder))


@pytest.mark.parametrize("seconds", [0.001, 60.0])
def test_impossible_clip_lengths_are_refused(tmp_path, seconds):
    with pytest.raises(ValueError, match=f"clip_seconds={seconds}"):
        tiny_trainer(tmp_path, clip_seconds=seconds)


def test_default_reward_without_a_network_says_so(tmp_path):
    """Fault: a stack trace after an hour of training instead of one line before it."""
    with pytest.raises(ValueError, match=r"needs CLAP.*diversity_embedder"):
        tiny_trainer(tmp_path, reward=None)


def test_a_wrong_number_of_embeddings_is_named(tmp_path):
    class Half(CodeEmbedder):
        def embed(self, inputs, sampling_rate=None):
            return super().embed(inputs)[::2]

    trainer = tiny_trainer(tmp_path, reward=DiversityReward(Half()))
    with pytest.raises(ValueError, match=r"'codes' returned shape .* for 8 clips"):
        trainer.train()


def test_the_divergence_budget_depends_on_the_start(tmp_path, tiny_folder):
    """Fault: a run from a student, which starts next to its teacher, held to a divergence that never grows."""
    held_out = {"eval_strategy": "steps", "alarms": True, "diversity_coef": 0.0}
    for settings, limit in (({}, 1.0), ({"teacher_model": tiny_folder}, 4.0)):
        args = tiny_args(tmp_path, **held_out, **settings)
        trainer = CFGDiversityTrainer(
            tiny_musicgen(), [], args, PROMPTS, PROMPTS, processing_class=tiny_processor()
        )
        found = [c for c in trainer.callback_handler.callbacks if isinstance(c, RewardHackingAlarm)]
        assert [alarm.kl_limit for alarm in found] == [limit]


def test_guidance_is_not_applied_twice(tmp_path, tiny_folder):
    """Fault: a student that continues as its own teacher, which already has the guidance inside."""
    student = tmp_path / "student"
    shutil.copytree(tiny_folder, student)
    write_provenance(student, Provenance("student", base_model=tiny_folder, guidance_scale=3.0))
    with pytest.raises(
        ValueError, match=r"student is distilled already.*set teacher_model \(--teacher_model\)"
    ):
        tiny_trainer(tmp_path, model=str(student))
    with pytest.raises(ValueError, match="distilled already, and as its own teacher"):
        tiny_trainer(tmp_path, model=load_policy(student))
    with pytest.raises(ValueError, match=r"teacher_model=.*student is distilled already"):
        tiny_trainer(tmp_path, model=tiny_folder, teacher_model=str(student))
    tiny_trainer(tmp_path, model=str(student), teacher_model=tiny_folder)
    tiny_trainer(tmp_path, model=str(student), guidance_scale=1.0)
    lora = make_adapter(tmp_path / "lora", Path(tiny_folder), seed=1, target_modules=["q_proj"])
    tiny_trainer(tmp_path, model=str(lora))  # somebody else's, without our record, was not distilled


def test_two_runs_cannot_write_into_one_folder(tmp_path):
    """Catches two trainings that both finish, with the weights of neither."""
    trainer = tiny_trainer(tmp_path, max_steps=1)
    with held(tmp_path), pytest.raises(FileExistsError, match=r"another process is writing to .*: wait"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.train()


def test_a_disk_that_cannot_hold_the_student_is_seen_before_the_first_step(tmp_path, monkeypatch):
    """Fault: hours of training that cannot be saved."""
    trainer = tiny_trainer(tmp_path, max_steps=1)
    weights = sum(parameter.numel() * 4 for parameter in trainer.model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=weights - 1))
    with pytest.raises(OSError, match=r"cannot be written: .* GB are needed and .* free some space"):
        trainer.train()
    assert trainer.state.global_step == 0
