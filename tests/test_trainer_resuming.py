"""Checkpoints: which weights are the student's, what is never saved, and what a run continues from."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from diverse_cfg.reading import last_checkpoint
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer
from diverse_cfg.trainer.checkpoints import RunMemory
from tests.faults import largest_file
from tests.tiny import PROMPTS, save_tiny, tiny_musicgen, tiny_processor
from tests.training import CodeEmbedder, largest_difference, losses, tiny_args, tiny_trainer, trained

LORA = LoraConfig(r=2, lora_alpha=4)
BOTH = pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


class At(TrainerCallback):
    """Does something with the trainer after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(kwargs)


def run(folder, resume=None, callbacks=(), **settings):
    trainer = tiny_trainer(folder, **settings)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ---- the averaged weights ------------------------------------------------------------------------


def weights_of(folder):
    """A saved student's trained weights, by the names that they have in the model."""
    adapter = folder / "adapter_model.safetensors"
    if adapter.is_file():
        return {key.replace(".weight", ".default.weight"): t for key, t in load_file(adapter).items()}
    return load_file(folder / "model.safetensors")


@BOTH
def test_after_training_the_model_is_what_is_evaluated_and_saved(tmp_path, peft_config):
    """Fault: the folder has the averaged weights and the model the raw ones, or the other way round."""
    sent = []

    class Tracker(TrainerCallback):  # as one that sends the model away at the end
        def on_train_end(self, args, state, control, model=None, **kwargs):
            sent.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    model = tiny_musicgen()
    trainer = CFGDiversityTrainer(
        model,
        DiversityReward(CodeEmbedder()),
        tiny_args(tmp_path, ema_decay=0.9, **EVERY_STEP),
        PROMPTS,
        processing_class=tiny_processor(),
        callbacks=[Tracker()],
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()
    now = trained(trainer)
    assert largest_difference(now, sent[0]) == 0
    assert largest_difference(now, load_file(tmp_path / "checkpoint-3" / "averaged_weights.safetensors")) == 0
    saved, raw = weights_of(tmp_path), weights_of(tmp_path / "checkpoint-3")
    assert all(torch.equal(saved[name], tensor) for name, tensor in now.items())
    assert max((raw[name] - tensor).abs().max().item() for name, tensor in now.items()) > 1e-4
    trainer.args.max_steps = 4  # and a second training begins from it
    trainer.train()
    assert largest_difference(trained(trainer), now) > 0


@pytest.mark.parametrize(
    ("peft_config", "only", "save_steps"),
    [(None, False, 1), (LORA, True, 1), (None, False, 4)],
    ids=["full", "lora, save_only_model", "best between what is saved"],
)
def test_the_best_model_is_the_average_of_the_best_checkpoint(tmp_path, peft_config, only, save_steps):
    """Fault: the best checkpoint is chosen by its averaged weights, and its raw ones, or later ones, are saved."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 4}
    settings |= {"metric_for_best_model": "eval_reward", "greater_is_better": True, "save_total_limit": 2}
    trainer = CFGDiversityTrainer(
        tiny_musicgen(),
        DiversityReward(CodeEmbedder()),
        tiny_args(
            tmp_path,
            ema_decay=0.9,
            save_only_model=only,
            per_device_eval_batch_size=8,
            **EVERY_STEP | {"save_steps": save_steps},
            **settings,
        ),
        PROMPTS,
        PROMPTS[:2],
        processing_class=tiny_processor(),
        peft_config=peft_config,
    )
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert trainer.state.best_global_step < 4  # else the last weights would do
    trainer.save_model()
    averaged, saved = load_file(best / "averaged_weights.safetensors"), weights_of(tmp_path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in averaged.items())
    assert trainer.evaluate()["eval_reward"] == trainer.state.best_metric


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_that_was_moved_still_ends_with_its_best_model(tmp_path, gone):
    """Fault: the best checkpoint is looked for in its old place, and the last weights are saved in its stead."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, **EVERY_STEP}
    settings |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
        "greater_is_better": False,
    }

    def trainer(folder, **more):
        return CFGDiversityTrainer(
            tiny_musicgen(),
            DiversityReward(CodeEmbedder()),
            tiny_args(folder, **settings, **more),
            PROMPTS,
            PROMPTS[:2],
            processing_class=tiny_processor(),
        )

    before = trainer(tmp_path / "run", max_steps=4)
    before.train()
    best = tmp_path / "moved" / f"checkpoint-{before.state.best_global_step}"
    assert best.name != "checkpoint-4"
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run").rename(tmp_path / "moved")
    after = trainer(tmp_path / "moved", max_steps=4)
    if gone:
        best.rename(tmp_path / best.name)
        last = last_checkpoint(tmp_path / "moved")
        with pytest.warns(UserWarning, match="the best checkpoint, is gone"):
            after.train(resume_from_checkpoint=last)
        assert after.state.best_global_step > int(last.rpartition("-")[2])
    else:
        after.train(resume_from_checkpoint=True)
        assert after.state.best_model_checkpoint == str(best)
        assert all(
            torch.equal(load_file(best / "model.safetensors")[k], t) for k, t in trained(after).items()
        )


# ---- nothing that is not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what", "peft_config"),
    [
        (
            {"learning_rate": float("inf")},
            r"44 of 44 weight tensors are inf or nan .*learning_rate=inf",
            None,
        ),
        ({"weight_decay": float("nan")}, r"weight tensors are inf or nan .*weight_decay=nan", None),
        (
            {"learning_rate": 1e30},
            r"logits are inf or nan.*learning_rate=1e\+30",
            None,
        ),  # finite, but of no use
        ({"learning_rate": float("inf")}, r"40 of 40 weight tensors", LORA),
    ],
)
def test_a_student_that_is_not_finite_is_never_saved(tmp_path, settings, what, peft_config):
    """Fault: rc 0, and a folder full of NaN."""
    trainer = tiny_trainer(tmp_path, max_steps=1, peft_config=peft_config, **EVERY_STEP)
    for name, value in settings.items():  # not all of which the settings themselves accept
        setattr(trainer.args, name, value)
    with pytest.raises(FloatingPointError, match=f"after step 1 .*{what}.*there is no checkpoint yet"):
        trainer.train()
    assert not list(tmp_path.iterdir())


def break_weights(kwargs):
    kwargs["optimizer"].param_groups[0]["lr"] = torch.inf


def break_optimizer(kwargs):  # as gradients of 1e20 do, whose square is infinite
    next(iter(kwargs["optimizer"].state.values()))["exp_avg_sq"].fill_(torch.inf)


@pytest.mark.parametrize(
    ("step", "diverge", "what"),
    [(2, break_weights, "weight tensors"), (3, break_optimizer, "optimizer's exp_avg_sq of tensor 0")],
)
def test_a_diverged_run_keeps_its_last_finite_checkpoint(tmp_path, step, diverge, what):
    """Fault: with save_total_limit=1 the good checkpoint goes when the broken one is written."""
    constant = {"lr_scheduler_type": "constant", "save_total_limit": 1, "ema_decay": 0.9}
    message = rf"after step 3 .*{what}.*the last checkpoint is .*checkpoint-2$"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, callbacks=[At(step, diverge)], max_steps=5, **EVERY_STEP, **constant)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    for file in (tmp_path / "checkpoint-2").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_only_a_checkpoint_of_this_run_is_named(tmp_path):
    """Fault: what an earlier run wrote at a later step is called the last checkpoint."""
    settings = {"lr_scheduler_type": "constant", "max_steps": 4, **EVERY_STEP}
    run(tmp_path, **settings)
    with pytest.raises(FloatingPointError, match=r"after step 3 .*the last checkpoint is .*checkpoint-2$"):
        run(tmp_path, str(tmp_path / "checkpoint-1"), callbacks=[At(2, break_weights)], **settings)


def test_a_loss_that_is_not_finite_makes_no_update(tmp_path, monkeypatch):
    """Fault: transformers leaves it out of the log and takes the step."""
    trainer = tiny_trainer(tmp_path)
    start = trained(trainer)
    compute = CFGDiversityTrainer._compute_loss
    monkeypatch.setattr(CFGDiversityTrainer, "_compute_loss", lambda *args: compute(*args) * torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan after step 0"):
        trainer.train()
    assert largest_difference(trained(trainer), start) == 0


def test_the_user_cannot_save_it_either(tmp_path):
    """Fault: a model that was broken elsewhere, by a callback at the end say, is saved as finished."""
    trainer = tiny_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.decoder.lm_heads[0].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="1 of 44 weight tensors"):
        trainer.save_model()


# ---- kills and faults while a checkpoint is written ----------------------------------------------


def test_a_run_killed_while_it_rewrites_a_checkpoint_continues_exactly(tmp_path, monkeypatch):
    """Fault: a folder with files of two runs counts as complete, because the old one's last file is there."""
    settings = {"max_steps": 3, "lr_scheduler_type": "constant", "ema_decay": 0.9, **EVERY_STEP}
    run(tmp_path / "run", **settings)
    killed = tmp_path / "killed"
    save = CFGDiversityTrainer._save_rng_state

    def copy_the_disk(self, folder):  # as it is when the process is killed here
        save(self, folder)
        if self.state.global_step == 3:
            shutil.copytree(tmp_path / "run", killed)

    with monkeypatch.context() as patch:
        patch.setattr(CFGDiversityTrainer, "_save_rng_state", copy_the_disk)
        patch.setattr(RunMemory, "check", lambda *_: None)  # which refuses another max_grad_norm
        run(tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"), max_grad_norm=1e-6, **settings)
    leftover = killed / ".checkpoint-3.00000003.incomplete"
    assert leftover.is_dir() and last_checkpoint(killed) == str(killed / "checkpoint-3")
    new, old = (weights_of(path / "checkpoint-3") for path in (tmp_path / "run", killed))
    assert largest_difference(new, old) > 1e-3  # of another run, and the old one is there as it was
    settings["max_steps"] = 4
    again, whole = run(killed, True, **settings), run(tmp_path / "whole", **settings)
    assert not leftover.exists() and losses(again) == losses(whole)
    assert largest_difference(trained(again), trained(whole)) == 0


def test_what_older_versions_left_half_written_is_passed_over(tmp_path):
    """Fault: a run killed while saving cannot be resumed, or resumes from rubble."""
    run(tmp_path, max_steps=2, **EVERY_STEP)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    again = run(tmp_path, resume=True, max_steps=3, **EVERY_STEP)
    assert again.state.global_step == 3 and len(losses(again)) == 3
    assert last_checkpoint(tmp_path, before=3) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        run(tmp_path / "nothing", resume=True)


@pytest.mark.parametrize(
    ("peft_config", "at_the_end"), [(None, False), (LORA, True)], ids=["checkpoint", "student"]
)
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, at_the_end, peft_config):
    """Fault: safetensors' traceback, half a checkpoint, and the student that was there is gone."""
    trainer = run(tmp_path, max_steps=1, peft_config=peft_config, **EVERY_STEP)
    trainer.save_model()

    def disk():
        return {
            path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".md"
        }

    before = disk()
    weights = tmp_path / ("adapter_model.safetensors" if peft_config else "model.safetensors")
    with (
        largest_file(weights.stat().st_size // 2),
        pytest.raises(OSError, match=r"cannot be written: it is too large for this disk.*write to another"),
    ):
        trainer.save_model() if at_the_end else trainer._save_checkpoint(trainer.model, None)
    assert disk() == before and not list(tmp_path.glob(".*"))


# ---- what a run continues from -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run with averaged weights that was stopped after its second step, full and LoRA."""
    root = tmp_path_factory.mktemp("runs")
    for name, peft_config in (("full", None), ("lora", LORA)):
        run(root / name, max_steps=2, ema_decay=0.9, peft_config=peft_config, **EVERY_STEP)
    return root


@pytest.fixture(scope="module")
def another(two_checkpoints):
    """Trainers of runs that shall continue from what they cannot continue from."""
    return {
        name: tiny_trainer(two_checkpoints / f"another-{name}", ema_decay=0.9, peft_config=peft_config)
        for name, peft_config in (("full", None), ("lora", LORA))
    }


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("name", "harm", "what"),
    [
        ("optimizer.pt", os.remove, "missing"),
        ("scheduler.pt", os.remove, "missing"),
        ("rng_state.pth", os.remove, "missing"),
        ("model.safetensors", os.remove, "missing"),
        ("averaged_weights.safetensors", os.remove, "missing"),
        ("optimizer.pt", truncate, "damaged"),
        ("rng_state.pth", zero, "damaged"),
        ("model.safetensors", truncate, "damaged"),
        ("averaged_weights.safetensors", zero, "damaged"),
        ("trainer_state.json", truncate, "damaged"),
        ("trainer_state.json", lambda path: path.write_text("[]"), "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(
    tmp_path, two_checkpoints, another, name, harm, what
):
    """Fault: a traceback, or a run that goes on with a new optimiser and says nothing."""
    run = shutil.copytree(two_checkpoints / "full", tmp_path / "run")
    harm(run / "checkpoint-2" / name)
    before = rf"checkpoint-2/{name} is {what}: continue .* resume_from_checkpoint=.*checkpoint-1$"
    with pytest.raises(ValueError, match=before):
        another["full"].train(resume_from_checkpoint=last_checkpoint(run))
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(ValueError, match="begin again, there is none before it"):
        another["full"].train(resume_from_checkpoint=last_checkpoint(run))


def test_clips_that_are_still_to_be_trained_on_must_be_there(tmp_path):
    """Fault: others are sampled in their stead, and the run goes another way than it would have gone."""
    settings = {"num_iterations": 2, "max_steps": 1, **EVERY_STEP}
    run(tmp_path, **settings)
    (tmp_path / "checkpoint-1" / "rollout_buffer_0.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-1/rollout_buffer_0.safetensors is missing: begin again"
    ):
        run(tmp_path, True, **settings | {"max_steps": 2})


def test_a_checkpoint_that_is_not_finite_is_not_continued(tmp_path, two_checkpoints, another):
    """Fault: older versions saved what had diverged; the error of the first step names it as the way back."""
    run = shutil.copytree(two_checkpoints / "full", tmp_path / "run")
    path = run / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    weights["decoder.lm_heads.0.weight"][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    message = r"checkpoint-2 \(after step 2 1 of 44 weight tensors .*continue from .*checkpoint-1$"
    with pytest.raises(ValueError, match=message):
        another["full"].train(resume_from_checkpoint=last_checkpoint(run))


def drop_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("decoder.lm_heads.0.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def foreign_keys(folder):
    tensors = {
        f"_orig_mod.{key}": value for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["decoder.lm_heads.0.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused_pickle(folder):
    torch.save({"state": os.getcwd}, folder / "optimizer.pt")


def another_optimizer(folder):
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")


@pytest.mark.parametrize(
    ("kind", "harm", "what"),
    [
        ("full", drop_a_tensor, r"it lacks weights such as decoder\.lm_heads\.0\.weight"),
        ("lora", foreign_keys, r"it lacks weights such as base_model.*lora_A\.weight"),
        ("full", another_shape, "size mismatch for decoder.lm_heads.0.weight"),
        ("full", refused_pickle, "Weights only load failed"),
        ("full", another_optimizer, "parameter group"),
    ],
)
def test_a_foreign_checkpoint_is_one_line(tmp_path, two_checkpoints, another, kind, harm, what):
    """Fault: weights of the start where the checkpoint has none, with a warning; or a traceback."""
    checkpoint = shutil.copytree(two_checkpoints / kind / "checkpoint-2", tmp_path / "checkpoint-2")
    harm(checkpoint)
    message = rf"checkpoint-2 cannot be continued \(.*{what}.*resume with the model"
    with pytest.raises(ValueError, match=message) as raised:
        another[kind].train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"learning_rate": 3e-3}, r"learning_rate=0.003 \(the run began with 0.01\): resume with what"),
        (
            {"diversity_coef": 6.0, "guidance_scale": 2.0},
            r"guidance_scale=2.0 .*3.0\), diversity_coef=6.0 .*5.0",
        ),
        ({"seed": 1, "clip_seconds": 0.3}, r"seed=1 .*42\), clip_seconds=0.3 \(the run began with 0.2\)"),
        ({"per_device_train_batch_size": 4}, r"per_device_train_batch_size=4 \(the run began with 8\)"),
        ({"optim": "sgd"}, r"optim='sgd' \(the run began with 'adamw_torch"),
        (
            {"lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "bf16": True},
            r"lr_scheduler_type='cosine' .*'linear'\), max_grad_norm=0.5 .*1.0\), bf16=True .*False\)",
        ),
        ({"warmup_steps": 1, "adaptive_clip": 3.0}, r"warmup_steps=1 .*0\), adaptive_clip=3.0 .*None\)"),
        ({"prompts": PROMPTS[::-1]}, r"train_dataset='4 prompts \(\w+\)' \(the run began with '4 prompts"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, two_checkpoints, changed, what):
    """Fault: the schedule's old learning rate wins and the new one is recorded; half a student of each method."""
    trainer = tiny_trainer(tmp_path, ema_decay=0.9, **changed)
    with pytest.raises(ValueError, match=f"checkpoint-2 cannot be continued with {what}") as raised:
        trainer.train(resume_from_checkpoint=str(two_checkpoints / "full" / "checkpoint-2"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"lora_alpha": 64}, r"lora_alpha=64 \(the run began with 4\)"),
        ({"alpha_pattern": {"fc1": 8}}, r"alpha_pattern=\{'fc1': 8\} \(the run began with \{\}\)"),
        (
            {"r": 4, "target_modules": ["q_proj"]},
            r"lora_r=4 .*2\), lora_target_modules=\['q_proj'\] .*'v_proj'",
        ),
    ],
)
def test_another_adapter_is_refused_by_name(tmp_path, two_checkpoints, changed, what):
    """Fault: another lora_alpha rescales the trained student in silence; another rank is torch's size mismatch."""
    peft_config = LoraConfig(**{"r": 2, "lora_alpha": 4} | changed)
    trainer = tiny_trainer(tmp_path, ema_decay=0.9, peft_config=peft_config)
    with pytest.raises(ValueError, match=f"checkpoint-2 cannot be continued with {what}"):
        trainer.train(resume_from_checkpoint=str(two_checkpoints / "lora" / "checkpoint-2"))


def test_another_initial_model_is_refused_by_name(tmp_path, tiny_folder):
    """Fault: with a teacher of its own, the student's folder names a start that it never had."""
    other, model = save_tiny(tmp_path / "other"), tiny_musicgen()
    model.decoder.lm_heads[0].weight.data.mul_(2)
    model.save_pretrained(other)
    settings = {"teacher_model": tiny_folder, **EVERY_STEP}
    run(tmp_path / "run", model=other, max_steps=1, **settings)
    with pytest.raises(
        ValueError, match="checkpoint-1 is of a run that began with the model other, and this one"
    ):
        run(tmp_path / "run", True, model=tiny_folder, **settings)
    moved = shutil.move(other, tmp_path / "moved")
    assert run(tmp_path / "run", True, model=str(moved), max_steps=2, **settings).state.global_step == 2


def test_a_run_that_ended_before_its_checkpoint_says_so(tmp_path, two_checkpoints):
    """Fault: no step is made, and the checkpoint is saved as the student of another run. The last step itself may be
    resumed: what comes after it is still to be saved."""
    checkpoint = str(two_checkpoints / "full" / "checkpoint-2")
    with pytest.raises(
        ValueError, match="checkpoint-2 has 2 steps behind it, and the run ends after 1: raise max_"
    ):
        run(tmp_path / "a", checkpoint, ema_decay=0.9, max_steps=1)
    assert run(tmp_path / "b", checkpoint, ema_decay=0.9, max_steps=2).state.global_step == 2


def without_settings(checkpoint):
    """As older versions wrote it."""
    state = checkpoint / "diversity_state.safetensors"
    save_file(load_file(state), state, metadata={"average": "1"})


def test_another_optimizer_is_one_line(tmp_path, two_checkpoints):
    """Fault: KeyError: 'momentum' at the first step."""
    checkpoint = shutil.copytree(two_checkpoints / "full" / "checkpoint-2", tmp_path / "checkpoint-2")
    without_settings(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be continued \(.*of another optim and lacks"):
        run(tmp_path / "run", str(checkpoint), ema_decay=0.9, optim="sgd")


def test_what_is_no_checkpoint_of_this_run_says_what_to_name(tmp_path, two_checkpoints, another):
    """Fault: "No such file or directory", or a hunt for pytorch_model.bin.index.json."""
    student = shutil.copytree(two_checkpoints / "full", tmp_path / "run")
    inside = (
        r"run is no checkpoint to resume from .*finished student.*resume_from_checkpoint=.*run/checkpoint-2$"
    )
    with pytest.raises(ValueError, match=inside):
        another["full"].train(resume_from_checkpoint=str(student))
    (student / "checkpoint-2" / "diversity_state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no diversity_state.*resume_from_checkpoint=.*checkpoint-1$"):
        another["full"].train(resume_from_checkpoint=str(student / "checkpoint-2"))
    for wrong, right, remedy in (("lora", "full", "with use_peft"), ("full", "lora", "without use_peft")):
        with pytest.raises(ValueError, match=rf"{wrong}/checkpoint-2 holds .*: resume {remedy}"):
            another[right].train(resume_from_checkpoint=str(two_checkpoints / wrong / "checkpoint-2"))


def test_damaged_weights_of_the_base_are_named(tmp_path, two_checkpoints):
    """Fault: at the end of the run, a callback or a reward function is said to have changed them."""
    checkpoint = shutil.copytree(two_checkpoints / "full" / "checkpoint-2", tmp_path / "checkpoint-2")
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-2000:] = bytes(2000)
    (checkpoint / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"checkpoint-2/model.safetensors is damaged, begin again"):
        run(tmp_path / "run", str(checkpoint), ema_decay=0.9)


def test_a_checkpoint_of_an_older_version_holds_no_settings(tmp_path, two_checkpoints):
    """Fault: what was written before can no longer be continued."""
    checkpoint = shutil.copytree(two_checkpoints / "full" / "checkpoint-2", tmp_path / "checkpoint-2")
    without_settings(checkpoint)
    again = run(tmp_path / "run", str(checkpoint), ema_decay=0.9, weight_decay=0.1, **EVERY_STEP)
    assert again.state.global_step == 3


def test_a_checkpoint_of_more_processes_goes_on_and_says_so(tmp_path, two_checkpoints):
    """Fault: an information that nobody sees."""
    checkpoint = shutil.copytree(two_checkpoints / "full" / "checkpoint-1", tmp_path / "checkpoint-1")
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    trainer = tiny_trainer(tmp_path / "run", ema_decay=0.9)
    with pytest.warns(
        UserWarning, match=r"checkpoint-1 has no rng_state.pth: .* another number of processes"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3


def test_a_metric_that_does_not_exist_is_one_line(tmp_path):
    """Fault: a KeyError's traceback after the first evaluation."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, **EVERY_STEP}
    args = tiny_args(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_rewrd", **settings)
    reward, processor = DiversityReward(CodeEmbedder()), tiny_processor()
    trainer = CFGDiversityTrainer(
        tiny_musicgen(), reward, args, PROMPTS, PROMPTS[:2], processing_class=processor
    )
    with pytest.raises(ValueError, match=r"metric_for_best_model='eval_rewrd' is not measured.*\breward,"):
        trainer.train()
