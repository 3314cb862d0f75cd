"""Settings: defaults, ranges, and everything of TRL that cannot work for audio codes."""

import dataclasses
import math
import warnings

import pytest
import torch
from transformers import HfArgumentParser
from trl import RLOOConfig

from diverse_cfg.config import CFGDiversityConfig, GuardConfig, MusicSFTConfig


def config(tmp_path, **settings):
    return CFGDiversityConfig(output_dir=str(tmp_path), report_to="none", **settings)


def test_defaults_are_the_papers_and_work_together(tmp_path):
    """Fault: a default of RLOO's comes through (G = 2, beta = 0.05, gradient checkpointing)."""
    args = config(tmp_path)
    assert (args.guidance_scale, args.distillation_coef, args.divergence) == (3.0, 1.0, "reverse_kl")
    assert args.num_generations >= 3 and args.beta == 0.0 and not args.gradient_checkpointing
    assert (args.temperature, args.top_k) == (1.0, 0)
    assert not args.guards.active


OUT_OF_RANGE = {
    "guidance_scale": [0.5, math.nan, math.inf, -1.0],
    "diversity_coef": [-1.0, math.nan, math.inf],
    "distillation_coef": [-0.1, math.nan],
    "learning_rate": [0.0, -1.0, math.nan],
    "divergence": ["kl"],
    "jsd_alpha": [0.0, 1.0, math.nan],
    "rollout_source": ["both"],
    "teacher_fraction": [0.0, 1.0],
    "clip_seconds": [0.0, -3.0, math.nan, math.inf],
    "diversity_codebooks": [0, -1],
    "prefix_lambda": [-0.1, 1.1, math.nan],
    "ema_decay": [1.0, -0.1, math.nan],
    "adaptive_clip": [0.0, math.nan],
    "term_norm_steps": [-1],
    "audio_samples": [-1],
    "loss_chunk_size": [0],
    "rollout_batch_size": [0],
    "rollout_backend": ["vllm", "Fast"],
    "temperature": [0.0, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in OUT_OF_RANGE.items() for v in values])
def test_out_of_range_names_field_and_value(tmp_path, name, value):
    """Fault: a comparison that NaN passes, or a limit off by one."""
    with pytest.raises(ValueError, match=rf"{name}={value!r} must be".replace("'", ".")):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # TRL's default, whose baseline cancels the whole signal.
        ({"num_generations": 1, "diversity_coef": 5.0}, "num_generations|at least"),
        ({"num_generations": 2, "diversity_coef": 5.0}, "num_generations|at least"),
        # TRL only asks that the *global* batch holds whole groups.
        ({"num_generations": 4, "per_device_train_batch_size": 6}, "num_generations"),
        ({"diversity_coef": 0.0, "distillation_coef": 0.0}, "both 0"),
        ({"rollout_source": "teacher", "diversity_coef": 5.0}, "rollout_source='teacher'"),
        ({"rollout_source": "mix", "sequence_score": True}, "sequence_score"),
        # Of transformers, after the model was loaded, as a TypeError or not at all.
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "num_decay_steps.*; set lr_scheduler_kwargs, which may",
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"banana": 1}},
            r"lr_scheduler_kwargs=\{'banana': 1\}: .*which may hold num_cycles$",
        ),
        ({"optim": "sgd", "optim_args": "momentum=0.9,banana=3"}, "optim=sgd has no banana; leave it out"),
        (
            {"optim": "sgd", "optim_args": "momentum=much"},
            "optim_args='momentum=much': momentum must be a num",
        ),
        ({"optim_args": "banana"}, "optim_args='banana': 'banana' must be name=value"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_scheduler_kwargs": "foo"}, "lr_scheduler_kwargs=.*foo"),
        ({"negative_prompt": " "}, "negative_prompt=' ' has no text"),
    ],
)
def test_what_would_fail_after_loading_is_refused_by_name(tmp_path, settings, said):
    """Fault: a traceback, or a message about a prompt that nobody gave, once the model is loaded."""
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


@pytest.mark.parametrize("owner", [CFGDiversityConfig, MusicSFTConfig])
@pytest.mark.parametrize(
    ("schedule", "given", "said"),
    [
        ("cosine_with_min_lr", {"min_lr": 1}, r"0\."),
        ("cosine_with_min_lr", {"min_lr_rate": 2}, "0.00"),
        ("cosine_warmup_with_min_lr", {"min_lr": 0, "warmup_lr_rate": 7}, "0.00"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": 3}, "0.00"),
        ("reduce_lr_on_plateau", {"min_lr": 1}, "1 in the end"),
        ("inverse_sqrt", {"timescale": 0}, r"none \(.*\) after step 3"),
    ],
)
def test_a_learning_rate_that_leaves_its_bounds_is_refused(tmp_path, owner, schedule, given, said):
    """Fault: a thousand times the learning rate, ascent in place of descent, or a crash at the last step."""
    for steps in (7, -1):
        settings = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": given, "warmup_steps": 3}
        settings |= {"eval_strategy": "steps", "learning_rate": 1e-3, "max_steps": steps}
        with pytest.raises(
            ValueError, match=f"{schedule} with .*the learning rate would be {said}.*: change lr_"
        ):
            owner(str(tmp_path), report_to="none", **settings)


@pytest.mark.parametrize("owner", [CFGDiversityConfig, MusicSFTConfig])
def test_a_schedule_of_negative_numbers_is_refused(tmp_path, owner):
    """Faults: a division by zero at the last step; a rate of 0 for half of the run."""
    for schedule, given in (("polynomial", {"power": -1}), ("cosine_with_min_lr", {"min_lr_rate": -1})):
        settings = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": given}
        with pytest.raises(ValueError, match=f"{next(iter(given))} is below 0: change lr_scheduler_kwargs"):
            owner(str(tmp_path), report_to="none", **settings)


@pytest.mark.parametrize("owner", [CFGDiversityConfig, MusicSFTConfig])
def test_what_accelerate_is_told_is_checked_first(tmp_path, owner, monkeypatch):
    """Faults: tracebacks of accelerate; `fsdp true` an unknown option; fp16 on a CPU, which switches bf16 off."""

    def make(**settings):
        return owner(str(tmp_path), report_to="none", use_cpu=True, **settings)

    for name, given in (("ddp_backend", "gloo"), ("fsdp", "true"), ("fsdp", True)):
        with pytest.raises(
            ValueError, match=f"^{name}=(gloo|True) is for several processes: start them with"
        ):
            make(**{name: given})
    for typo in ({"split_batch": True}, '{"split_batch": true}'):
        with pytest.raises(
            ValueError, match="accelerator_config has no setting split_batch; known: split_batches"
        ):
            make(accelerator_config=typo)
    with pytest.raises(ValueError, match=r"accelerator_config\.even_batches='x' must be true or false"):
        make(accelerator_config={"even_batches": "x"})
    assert make(accelerator_config={"even_batches": False}).accelerator_config.even_batches is False
    assert make(fsdp="false").fsdp is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    with pytest.warns(UserWarning, match="fp16=True has no effect: a CPU has no float16"):
        args = make(fp16=True)
    assert (args.fp16, args.bf16) == (False, True)


def test_schedules_that_can_be_built_are_taken(tmp_path):
    """Fault: the check before the run refuses what the run itself accepts."""
    decay = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}}
    for settings in (decay, {"lr_scheduler_type": "constant"}):
        assert config(tmp_path, max_steps=2, **settings)
    assert config(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    assert config(tmp_path, optim="sgd", optim_args="momentum=0.9, nesterov=true")


def test_a_warmup_that_takes_the_whole_run_is_warned_about(tmp_path):
    """Fault: a student equal to its base."""
    with pytest.warns(UserWarning, match="warmup_steps=100 is not over when max_steps=1 ends the run"):
        config(tmp_path, warmup_steps=100, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(tmp_path, warmup_steps=1, max_steps=2)


def test_two_generations_are_enough_without_diversity(tmp_path):
    assert config(tmp_path, num_generations=2, diversity_coef=0.0).num_generations == 2


def test_guards_are_a_nested_group(tmp_path):
    """Fault: a misspelt guard that never guards."""
    args = config(tmp_path, guards={"silence_dbfs": -50.0})
    assert args.guards == GuardConfig(silence_dbfs=-50.0) and args.guards.active
    assert args.to_dict()["guards"]["silence_dbfs"] == -50.0
    assert config(tmp_path, guards="{max_silence: 0.1}").guards.max_silence == 0.1  # as on a command line
    with pytest.raises(ValueError, match=r"guards is not valid YAML"):
        config(tmp_path, guards="{max_silence: 0.1")
    with pytest.raises(ValueError, match="no field silence_db"):
        config(tmp_path, guards={"silence_db": -50.0})


def test_command_line_and_help(tmp_path):
    """Fault: an unescaped percent sign or a type that argparse cannot build."""
    parser = HfArgumentParser(CFGDiversityConfig)
    assert "guidance_scale" in parser.format_help()
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--diversity_coef", "15", "--guards", '{"max_clipping": 0.5}']
    )
    assert args.diversity_coef == 15.0 and args.guards.max_clipping == 0.5


def test_own_fields_are_few_and_documented():
    """Fault: a field nobody explained; the class docstring is the reference."""
    inherited = {f.name for f in dataclasses.fields(RLOOConfig)}
    own = [f.name for f in dataclasses.fields(CFGDiversityConfig) if f.name not in inherited]
    undocumented = [name for name in own if f"        {name}: " not in CFGDiversityConfig.__doc__]
    assert not undocumented
    assert len(own) <= 27
