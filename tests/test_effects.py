"""Every setting of the installed TRL and transformers, and our own: it acts, is refused, or waits for another."""

import dataclasses
import warnings
from fnmatch import fnmatchcase

import pytest
import torch

from diverse_cfg.cli.train import TrainArguments
from diverse_cfg.config import CFGDiversityConfig, GuardConfig
from diverse_cfg.effects import ACTS, RULES, _rule_of, idle_settings
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.settings import field_types
from diverse_cfg.trainer import CFGDiversityTrainer
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor
from tests.training import CodeEmbedder, WaveEmbedder, largest_difference, tiny_args, tiny_trainer, trained

FIELDS = {
    field.name: field
    for owner in (CFGDiversityConfig, GuardConfig, TrainArguments)
    for field in dataclasses.fields(owner)
}
REFUSED = [name for name in FIELDS if (rule := _rule_of(name)) and rule.never]
# Values with another meaning than "not the default", or that only these types take.
WRONG = {
    "beta": 0.05,  # TRL's default, which would load a second model
    "disable_dropout": None,
    "average_tokens_across_devices": None,
    "do_train": None,
    "reward_clip_range": (-1.0, 1.0),
    "include_for_metrics": ["loss"],
    "include_num_input_tokens_seen": "all",
    "pad_to_multiple_of": 8,
    "vllm_mode": "elsewhere",
}


def config(folder, **settings):
    return CFGDiversityConfig(output_dir=str(folder), report_to="none", bf16=False, use_cpu=True, **settings)


def warned(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make()
    return made, " ".join(str(one.message) for one in caught if "has no effect" in str(one.message))


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_its_place(name):
    """Fault: an option of a new TRL or transformers that is accepted and does nothing. Decide what it does here,
    see it act, and give it its place in `diverse_cfg.effects`."""
    places = [pattern for pattern in ACTS if fnmatchcase(name, pattern)]
    places += [
        rule.names for rule in RULES if any(fnmatchcase(name, pattern) for pattern in rule.names.split())
    ]
    assert len(places) == 1, f"{name} is in {len(places)} places: {places}"


def other_value(name):
    """A value that is not the default."""
    if name in WRONG:
        return WRONG[name]
    default, types = FIELDS[name].default, str(field_types(CFGDiversityConfig)[name])
    if isinstance(default, bool):
        return not default
    if "dict" in types:
        return {"a": 1}
    if isinstance(default, int | float) or "int" in types or "float" in types:
        return (default or 0) + 1
    return ["x"] if "str" not in types else "x"


@pytest.mark.parametrize("name", REFUSED)
def test_what_never_acts_is_refused_with_a_remedy(tmp_path, name):
    value = other_value(name)
    if value is None:
        assert config(tmp_path, **{name: not FIELDS[name].default})  # it asks for what is done anyway
        return
    with pytest.raises(
        ValueError, match=rf"^{name}=.* is not supported: .*(leave|set|pass|lower|count|chunk)"
    ):
        config(tmp_path, **{name: value})


def test_defaults_are_never_refused_nor_warned_about(tmp_path):
    """Fault: a file of settings that were saved with their defaults cannot be read again."""
    defaults = {
        name: field.default
        for name, field in FIELDS.items()
        if name in CFGDiversityConfig.__dataclass_fields__
        and field.default is not dataclasses.MISSING
        and name not in ("output_dir", "report_to", "bf16", "use_cpu")
    }
    assert warned(lambda: config(tmp_path, **defaults))[1] == ""
    # Defaults of other versions of TRL.
    config(tmp_path, pad_to_multiple_of=None, router_aux_loss_coef=0.001, vllm_mode="server", min_p=0.0)


G = {"diversity_coef": 5.0}
# setting → (value, settings without which it does nothing, settings with which it acts)
WAITING = {
    "num_train_epochs": (1.0, {"max_steps": 3}, {}),
    "warmup_steps": (3, {"lr_scheduler_type": "constant"}, {}),
    "lr_scheduler_kwargs": (
        {"num_cycles": 2},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine"},
    ),
    "adam_beta1": (0.5, {"optim": "sgd"}, {}),
    "adam_beta2": (0.5, {"optim": "adafactor"}, {"optim": "adamw_torch"}),
    "adam_epsilon": (0.5, {"optim": "adagrad"}, {}),
    "optim_args": ("momentum=0.9", {}, {"optim": "sgd"}),
    "optim_target_modules": (["q_proj"], {}, {"optim": "galore_adamw"}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {}, {"gradient_checkpointing": True}),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, {}, {"activation_checkpointing": True}),
    "logging_steps": (3, {"logging_strategy": "no"}, {}),
    "eval_steps": (3, {}, {"eval_strategy": "steps"}),
    "eval_delay": (3, {}, {"eval_strategy": "steps"}),
    "do_eval": (True, {}, {"eval_strategy": "steps"}),
    "save_steps": (3, {"save_strategy": "no"}, {}),
    "save_total_limit": (3, {"save_strategy": "no"}, {}),
    "save_only_model": (True, {"save_strategy": "no"}, {}),
    "load_best_model_at_end": (True, {"save_strategy": "no"}, {"eval_strategy": "steps"}),
    "metric_for_best_model": ("reward", {}, {"eval_strategy": "steps"}),
    "greater_is_better": (True, {}, {"metric_for_best_model": "reward"}),
    "hub_strategy": ("checkpoint", {}, {"push_to_hub": True}),
    "hub_always_push": (True, {}, {"push_to_hub": True}),
    "hub_model_id": ("x", {}, {"push_to_hub": True}),
    "hub_token": ("hf_secret", {}, {"push_to_hub": True}),
    "hub_revision": ("x", {}, {"push_to_hub": True}),
    "ignore_data_skip": (True, {}, {"resume_from_checkpoint": "true"}),
    "restore_callback_states_from_checkpoint": (True, {}, {"resume_from_checkpoint": "true"}),
    "fsdp_config": ({"version": 2}, {}, None),
    "ddp_find_unused_parameters": (True, {}, None),  # and the others act in several processes
    "ddp_bucket_cap_mb": (9, {}, None),
    "ddp_broadcast_buffers": (True, {}, None),
    "ddp_static_graph": (True, {}, None),
    "ddp_timeout": (9, {}, None),
    "run_name": ("x", {}, {"report_to": "trackio"}),
    "project": ("x", {}, {"report_to": "trackio"}),
    "trackio_space_id": ("x", {"report_to": "wandb"}, {"report_to": "trackio"}),
    "trackio_bucket_id": ("x", {}, {"report_to": "trackio"}),
    "trackio_static_space_id": ("x", {}, {"report_to": ["wandb", "trackio"]}),
    "num_completions_to_print": (3, {}, {"log_completions": True}),
    "log_unique_prompts": (True, {"log_completions": True}, {"log_completions": True, "report_to": "wandb"}),
    "dataloader_persistent_workers": (True, {}, {"dataloader_num_workers": 1}),
    "dataloader_multiprocessing_context": ("spawn", {}, {"dataloader_num_workers": 1}),
    "dataloader_in_order": (False, {}, {"dataloader_num_workers": 1}),
    "epsilon": (0.1, {"gradient_accumulation_steps": 4}, {"num_iterations": 2}),
    "epsilon_high": (0.3, {}, {"steps_per_generation": 2}),
    "negative_prompt": ("noise", {"guidance_scale": 1.0}, {}),
    "guidance_schedule": ("linear", {"guidance_scale": 1.0}, {}),
    "jsd_alpha": (0.3, {}, {"divergence": "generalized_jsd"}),
    "teacher_fraction": (0.3, {}, {"rollout_source": "mix"}),
    "sequence_score": (True, {"distillation_coef": 0.0}, {}),
    "diversity_codebooks": (1, {"diversity_coef": 0.0}, {}),
    "prefix_baseline": (True, {"diversity_coef": 0.0}, {}),
    "guards": ({"max_silence": 0.3}, {"diversity_coef": 0.0}, {}),
    "prefix_lambda": (0.5, {}, {"prefix_baseline": True}),
    "log_completions": (True, None, None),  # by what is installed
    "lora_r": (4, {}, {"use_peft": True}),
    "lora_alpha": (4, {}, {"use_peft": True}),
    "lora_target_modules": (["q_proj"], {}, {"use_peft": True}),
    "gate_quantile": (0.2, {}, {"gate": "text_adherence"}),
}


def test_the_table_of_what_waits_is_whole():
    assert {name for name in FIELDS if (rule := _rule_of(name)) and rule.acts} == WAITING.keys()


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_another_setting_is_warned_about(tmp_path, name):
    """Fault: hours of training with a setting that did nothing."""
    value, without, enough = WAITING[name]
    for changes, acts in ((without, False), (enough, True)):
        if changes is None:
            continue
        if name in TrainArguments.__dataclass_fields__:
            said = " ".join(idle_settings(TrainArguments("m", "d", **changes, **{name: value})))
        else:
            own = name in CFGDiversityConfig.__dataclass_fields__
            settings = changes | {name: value} if own else {"guards": changes | {name: value}}
            settings = {"report_to": "none", "bf16": False, "use_cpu": True} | settings
            said = warned(lambda settings=settings: CFGDiversityConfig(str(tmp_path), **settings))[1]
        shown = name if "token" in name else f"{name}={value!r}"
        assert (f"{shown} has no effect: " in said) is not acts, said
        assert "hf_secret" not in said


def test_what_the_trainer_alone_knows_is_warned_about(tmp_path):
    """Fault: guards given to the settings and not to the reward that the user built; monitors that never run."""
    build = lambda **changes: warned(lambda: tiny_trainer(tmp_path, **changes))[1]  # noqa: E731
    assert build() == ""
    assert "monitor_embedder='x' has no effect" in build(monitor_embedder="x", audio_samples=0)
    assert "audio_samples=2 has no effect: it acts at evaluations" in build(audio_samples=2)
    assert "num_generations_eval=4 has no effect" in build(num_generations_eval=4)
    assert "guards={'max_silence': 0.3} has no effect" in build(guards={"max_silence": 0.3})
    guarded = DiversityReward(WaveEmbedder(), GuardConfig(max_silence=0.5))
    assert build(guards={"max_silence": 0.3}, reward=guarded) == ""
    assert "term_norm_steps=1 has no effect" in build(term_norm_steps=1, diversity_coef=0.0)
    assert "diversity_embedder='x' has no effect" in build(
        reward=None, diversity_embedder="x", diversity_coef=0.0
    )


# setting → value, and what must differ from the run without it
ACTING = {
    **dict.fromkeys(("learning_rate", "weight_decay"), 0.03),
    "seed": 1,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "num_generations": 8,
    "num_iterations": 2,
    "max_steps": 1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.01,
    "temperature": 0.8,
    "bf16": True,
    "shuffle_dataset": False,
    "guidance_scale": 2.0,
    "diversity_coef": 8.0,
    "distillation_coef": 0.5,
    "divergence": "forward_kl",
    "rollout_source": "mix",
    "clip_seconds": 0.3,
    "adaptive_clip": 0.1,
    "negative_prompt": "sad",
    "guidance_schedule": "cosine",
    "sequence_score": True,
    "prefix_baseline": True,
    "diversity_codebooks": 1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "warmup_steps": 2,
}


def test_a_student_that_is_its_own_teacher_is_refused(tmp_path):
    """Fault: a loss of 0 from the first step to the last, and a copy of the start as the student."""
    nothing = {"guidance_scale": 1.0, "diversity_coef": 0.0}
    for reward, more in (("codes", {}), (None, {}), (halves, {"reward_weights": [0.0]})):
        with pytest.raises(
            ValueError, match="guidance_scale=1 without teacher_model and without a reward that co"
        ):
            tiny_trainer(tmp_path, reward=reward, **nothing, **more)
    assert tiny_trainer(tmp_path, reward=halves, **nothing)


def halves(prompts, completions, **_):
    return [0.5] * len(prompts)


@pytest.mark.slow
def test_what_is_said_to_act_acts(tmp_path):
    """Fault: a setting in the list of those that act, which changes nothing of a training."""

    def run(**changes):
        trainer = tiny_trainer(tmp_path / "run", **({"max_steps": 2, "prompts": PROMPTS * 4} | changes))
        trainer.train()
        return trained(trainer)

    plain = run()
    assert largest_difference(plain, run()) == 0
    assert [
        name for name, value in ACTING.items() if largest_difference(plain, run(**{name: value})) == 0
    ] == []
    jsd = {"divergence": "generalized_jsd"}
    assert largest_difference(run(**jsd), run(**jsd, jsd_alpha=0.3)) > 0
    mix = {"rollout_source": "mix", "prompts": PROMPTS * 4, "per_device_train_batch_size": 16}
    assert largest_difference(run(**mix), run(**mix, teacher_fraction=0.8)) > 0


def test_resume_from_checkpoint_is_a_setting(tmp_path):
    """Fault: the Python trainer ignores it and begins anew, over the checkpoints that were named."""
    straight = tiny_trainer(tmp_path / "a", save_strategy="steps", save_steps=2)
    straight.train()
    for wanted in (str(tmp_path / "a" / "checkpoint-2"), "true"):
        again = tiny_trainer(tmp_path / "a", resume_from_checkpoint=wanted)
        again.train()
        assert largest_difference(trained(again), trained(straight)) == 0
        assert len([entry for entry in again.state.log_history if "loss" in entry]) == 3
        assert again.state.log_history[-1]["train_loss"] < straight.state.log_history[-1]["train_loss"]


# ---- evaluations ---------------------------------------------------------------------------------


def evaluated(folder, reward="codes", held_out=PROMPTS, **settings):
    reward = DiversityReward(CodeEmbedder()) if reward == "codes" else reward
    return CFGDiversityTrainer(
        tiny_musicgen(),
        reward,
        tiny_args(folder, **settings),
        PROMPTS,
        held_out,
        processing_class=tiny_processor(),
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"per_device_eval_batch_size": 6},
            "per_device_eval_batch_size=6 is not divisible by the 4 clips.*take 8",
        ),
        ({"num_generations_eval": 1}, "num_generations_eval=1: diversity is a distance"),
        ({"num_generations_eval": 3}, "per_device_eval_batch_size=8 is not divisible by the 3 clips"),
    ],
)
def test_an_evaluation_that_would_fail_is_refused_before_training(tmp_path, monkeypatch, settings, said):
    """Fault: a crash at the first evaluation; with two processes TRL lets 2 × 6 pass, and splits a group."""
    monkeypatch.setattr("diverse_cfg.trainer.trainer.separate_teacher", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=said):
        evaluated(tmp_path, **settings)
    for wanted in ({"eval_strategy": "steps"}, {"eval_on_start": True}):
        with pytest.raises(ValueError, match=said):
            config(tmp_path, **settings, **wanted)
    assert config(tmp_path, **settings)  # nothing is evaluated


def test_evaluations_without_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no held-out prompts: pass eval_dataset"):
        evaluated(tmp_path, held_out=None, eval_on_start=True)


@pytest.mark.parametrize("sequence_score", [False, True])
def test_eval_loss_is_the_objective(tmp_path, sequence_score):
    """Fault: the best model by default is the least diverse, since `eval_loss` knows no β."""

    def halves(prompts, completions, **_):
        return [0.5 if index % 4 else None for index in range(len(prompts))]

    rewards = [DiversityReward(CodeEmbedder()), halves]
    weights = {"reward_weights": [1.0, 3.0], "distillation_coef": 0.5, "sequence_score": sequence_score}
    found = evaluated(tmp_path, rewards, **weights).evaluate()
    codes = 10 * 4
    earned = 5.0 * found["eval_reward/diversity"] + 3.0 * 0.5 * 3 / 4
    assert found["eval_loss"] == pytest.approx(
        0.5 * found["eval_loss/distillation"] - earned / codes, abs=1e-5
    )
    plain = evaluated(tmp_path, diversity_coef=0.0).evaluate()
    assert plain["eval_loss"] == pytest.approx(plain["eval_loss/distillation"], abs=1e-6)
    assert torch.isfinite(torch.tensor(found["eval_loss"]))


def test_every_evaluation_set_has_its_own_numbers(tmp_path):
    """Fault: the sets overwrite each other's metrics, and the best model is chosen by the last one."""
    sets = {"first": PROMPTS[:2], "second": PROMPTS[2:]}
    together = evaluated(tmp_path, held_out=sets).evaluate()
    for name, prompts in sets.items():
        alone = evaluated(tmp_path, held_out={name: prompts}).evaluate()
        for metric in ("loss", "reward/diversity", "kl/clip", "rewards/diversity/mean"):
            key = f"eval_{name}_{metric}"
            assert together[key] == pytest.approx(alone[key], abs=1e-6)
    assert together["eval_first_kl/clip"] != together["eval_second_kl/clip"]
    assert not any(key in together for key in ("eval_loss", "eval_kl/clip"))
