"""`MusicSFTTrainer`: its loss, its order, what is kept, and that it learns."""

import numpy as np
import pytest
import torch
from peft import LoraConfig

from diverse_cfg.config import MusicSFTConfig
from diverse_cfg.functional.codebooks import apply_delay_pattern
from diverse_cfg.policies.loading import is_distilled, load_policy, load_processor
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.recordings import IGNORED, Recording
from diverse_cfg.trainer import MusicSFTTrainer
from diverse_cfg.trainer.objective import likelihood_terms
from tests.test_recordings import music, write
from tests.tiny import PROMPTS, save_tiny, tiny_musicgen, tiny_processor
from tests.training import largest_difference, losses, trained


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Six of different length, one of them shorter than a clip."""
    folder = tmp_path_factory.mktemp("music")
    lengths = (1.0, 1.3, 0.7, 0.2, 2.1, 1.0)
    return [
        Recording(f"{i}", PROMPTS[i % 4], write(folder / f"{i}.flac", music(seconds, seed=i)))
        for i, seconds in enumerate(lengths)
    ]


def sft_args(folder, **settings):
    defaults = {
        "clip_seconds": 0.4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "audio_samples": 0,
        "held_out": 0.3,
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
    }
    return MusicSFTConfig(output_dir=str(folder), **{**defaults, **settings})


def sft_trainer(folder, recordings, model=None, peft_config=None, **settings):
    return MusicSFTTrainer(
        tiny_musicgen() if model is None else model,
        sft_args(folder, **settings),
        recordings,
        processing_class=None if isinstance(model, str) else tiny_processor(),
        peft_config=peft_config,
    )


# ---- the loss ----------------------------------------------------------------------------------------


def clips(policy, lengths=(7, 4), frames=7, seed=0):
    """Labels [N, K, T] of clips of these lengths, and their condition."""
    books = len(policy.delays)
    labels = torch.randint(16, (len(lengths), books, frames), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        labels[row, :, length:] = IGNORED
    return labels, policy.encode_text(PROMPTS[: len(lengths)])


@pytest.mark.parametrize("channels", [1, 2])
def test_the_loss_is_the_mean_over_the_codes_that_there_are(channels):
    """Faults: cells of the delay pattern without a code counted, a codebook read one step off, the filling behind a
    short clip seen by its last frames. The oracle walks over the cells and asks transformers' model itself."""
    policy = as_policy(tiny_musicgen(channels), tiny_processor(audio_channels=channels))
    labels, condition = clips(policy)
    terms = likelihood_terms(policy, labels, condition, 1 / int((labels >= 0).sum()), chunk_size=3)
    total, count = 0.0, 0
    for row, length in enumerate((7, 4)):
        steps = length + max(policy.delays)
        inputs = np.full((len(policy.delays), steps), 16)  # 16 starts and pads
        for book, delay in enumerate(policy.delays):
            for frame in range(length):
                if 1 + delay + frame < steps:
                    inputs[book, 1 + delay + frame] = labels[row, book, frame]
        with torch.no_grad():
            logits = policy.model(
                encoder_outputs=(condition.hidden_states[row : row + 1],),
                attention_mask=condition.attention_mask[row : row + 1],
                decoder_input_ids=torch.from_numpy(inputs),
            ).logits.double()
        for book, delay in enumerate(policy.delays):
            for frame in range(length):
                cell = logits[book, frame + delay].numpy()
                total += np.log(np.exp(cell - cell.max()).sum()) + cell.max() - cell[labels[row, book, frame]]
                count += 1
    assert count == (7 + 4) * len(policy.delays)
    assert terms.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_the_loss_agrees_with_transformers_where_clips_are_whole():
    """Its loss is the mean over codebooks of means over valid cells: the same for clips of one length. Of clips of
    several lengths too, since a clip has as many codes in every codebook; what differs is that it wants labels that
    are delayed already, and counts a label of 2048 as none."""
    policy = as_policy(tiny_musicgen(), tiny_processor())
    labels, condition = clips(policy)
    for rows in (slice(0, 1), slice(0, 2)):
        part, text = labels[rows], condition.select(rows)
        grid = apply_delay_pattern(part.clamp_min(0), 16, policy.delays)[..., 1:]
        valid = apply_delay_pattern((part >= 0).long(), 0, policy.delays)[..., 1:].bool()
        delayed = torch.where(valid, grid, IGNORED).transpose(1, 2)  # [N, S, K]
        theirs = policy.model(
            encoder_outputs=(text.hidden_states,), attention_mask=text.attention_mask, labels=delayed
        ).loss
        ours = likelihood_terms(policy, part, text, 1 / int((part >= 0).sum()), 64).loss
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_loss():
    """Fault: chunks or ignored codes that leak into the gradient. Against autograd on the plain log-softmax."""
    policy = as_policy(tiny_musicgen(), tiny_processor())
    labels, condition = clips(policy)
    valid = labels >= 0
    head = policy.model.decoder.lm_heads[2].weight
    likelihood_terms(policy, labels, condition, 1 / int(valid.sum()), chunk_size=3).loss.backward()
    found, head.grad = head.grad.clone(), None
    logits = policy.code_logits(torch.where(valid, labels, 16), condition)
    torch.nn.functional.cross_entropy(logits[valid], labels[valid]).backward()
    assert torch.allclose(found, head.grad, atol=1e-6) and found.abs().max() > 1e-3


def test_accumulation_does_not_change_the_step(tmp_path, recordings):
    """Fault: a micro-batch with fewer codes that counts as much as the others."""
    whole = sft_trainer(tmp_path / "a", recordings, per_device_train_batch_size=4, held_out=0.0)
    parts = sft_trainer(
        tmp_path / "b", recordings, per_device_train_batch_size=1, gradient_accumulation_steps=4, held_out=0.0
    )
    for trainer in (whole, parts):
        trainer.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    assert largest_difference(trained(whole), trained(parts)) < 1e-3


def test_dropped_texts_are_the_null_prompt(tmp_path, recordings):
    """Fault: guidance that has nothing to guide away from, since an empty text was trained in place of none."""
    trainer = sft_trainer(tmp_path, recordings)
    labels, condition = clips(trainer._policy)
    batch = {"labels": labels, "captions": PROMPTS[:2], "dropped": torch.tensor([True, False])}
    logps = trainer._likelihood(trainer.model, batch, 0.0).logps
    whole = torch.where(labels >= 0, labels, 16)
    for row, text in ((0, None), (1, condition.select([1]))):
        logits = trainer._policy.code_logits(whole[row : row + 1], text).log_softmax(-1)
        valid = labels[row] >= 0
        expected = logits[0].gather(-1, labels[row].clamp_min(0)[..., None])[..., 0]
        assert torch.allclose(logps[row][valid], expected[valid], atol=1e-5)


# ---- the run -----------------------------------------------------------------------------------------


def lora_config(lora):
    return LoraConfig(r=2, lora_alpha=4) if lora else None


@pytest.mark.parametrize("lora", [False, True])
def test_a_killed_run_goes_on_to_the_bit(tmp_path, recordings, lora):
    """Faults: other clips, dropped texts or order after a resumption, in the middle of an epoch or in a later one."""
    keeping = {"text_dropout": 0.5, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}

    def run(**settings):
        trainer = sft_trainer(
            tmp_path, recordings, peft_config=lora_config(lora), max_steps=8, **keeping, **settings
        )
        trainer.train()
        return trainer

    straight = run()
    assert 2 < len(straight.train_dataset) / 2 < 6  # checkpoints lie within the first epoch and behind it
    for step in (2, 6):
        resumed = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert largest_difference(trained(resumed), trained(straight)) == 0
        assert losses(resumed) == losses(straight)
    other = sft_trainer(
        tmp_path, recordings, peft_config=lora_config(lora), **keeping | {"text_dropout": 0.2}
    )
    with pytest.raises(ValueError, match=r"text_dropout=0\.2 \(the run began with 0\.5\)"):
        other.train(str(tmp_path / "checkpoint-6"))


def test_a_resumed_run_keeps_its_model_adapter_and_schedule(tmp_path, recordings, tiny_folder):
    """Faults: a rescaled adapter, another base's name in finetune.json, a schedule of two halves; all in silence."""
    keeping = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    base = save_tiny(tmp_path / "base", seed=1)
    for lora, changed, what in (
        (None, {"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine'"),
        (None, {"model": tiny_folder}, "began with the model base, and this one"),
        (LoraConfig(r=2, lora_alpha=4), {"peft_config": LoraConfig(r=2, lora_alpha=64)}, "lora_alpha=64"),
    ):
        folder, start = tmp_path / f"{what[:4]}", {"model": base, "peft_config": lora}
        sft_trainer(folder, recordings, **start, **keeping).train()
        with pytest.raises(ValueError, match=what):
            sft_trainer(folder, recordings, **start | changed | keeping | {"max_steps": 2}).train(True)


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_is_a_base(tmp_path, recordings, lora, tiny_folder):
    """Faults: an adapter that every other command takes for a distilled student and plays without guidance; a merged
    weight that is not the sum; T5's ids or no guidance in the settings."""
    trainer = sft_trainer(tmp_path / "run", recordings, tiny_folder, peft_config=lora_config(lora))
    trainer.train()
    trainer.save_model()
    assert not is_distilled(tmp_path / "run")
    saved = load_policy(tmp_path / "run")
    assert saved.generation_config.guidance_scale == 3.0 and saved.config.decoder.pad_token_id == 16
    assert load_processor(tmp_path / "run").tokenizer("sad cello")
    labels, condition = clips(trainer._policy)
    ours, theirs = (
        as_policy(m).code_logits(labels.clamp_min(0), condition) for m in (trainer._policy.model, saved)
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    before = as_policy(load_policy(tiny_folder)).code_logits(labels.clamp_min(0), condition)
    assert (before - theirs).abs().max() > 0.1
    assert not (tmp_path / "run" / "training_args.bin").exists()
    with pytest.raises(ValueError, match="would write over the model"):
        sft_trainer(tmp_path / "run", recordings, str(tmp_path / "run"))


def test_an_evaluation_tells_held_out_loss_and_what_the_text_is_worth(tmp_path, recordings):
    """Faults: the mean of means of batches, in which short clips count as long ones; a run that changes when it is
    looked at; no clips to hear."""
    trainer = sft_trainer(tmp_path / "a", recordings, audio_samples=2, per_device_eval_batch_size=2)
    found = trainer.evaluate()
    policy, cuts = trainer._policy, trainer.eval_dataset
    sums = {"told": 0.0, "untold": 0.0, "first": 0.0}
    count = 0
    for number in range(len(cuts)):
        labels = cuts[number]["labels"][None]
        valid, codes = labels >= 0, torch.where(labels >= 0, labels, 16)
        text = policy.encode_text([cuts[number]["caption"]])
        for name, condition in (("told", text), ("untold", None)):
            with torch.no_grad():
                logps = policy.code_logits(codes, condition).log_softmax(-1)
            nats = -logps.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
            sums[name] += float(nats[valid].sum())
            if name == "told":
                sums["first"] += float(nats[:, 0][valid[:, 0]].sum())
        count += int(valid.sum())
    assert found["eval_loss"] == pytest.approx(sums["told"] / count, rel=1e-5)
    assert found["eval_loss/no_text"] == pytest.approx(sums["untold"] / count, rel=1e-5)
    assert found["eval_loss/codebook_0"] == pytest.approx(4 * sums["first"] / count, rel=1e-5)
    assert len(list((tmp_path / "a" / "audio" / "step-000000").glob("*.wav"))) == len(
        {recording.caption for recording in trainer.held_out}
    )
    looked = sft_trainer(tmp_path / "b", recordings, eval_strategy="steps", eval_steps=1, audio_samples=1)
    blind = sft_trainer(tmp_path / "c", recordings)
    for one in (looked, blind):
        one.train()
    assert largest_difference(trained(looked), trained(blind)) == 0


def test_activation_checkpointing_changes_no_gradient(tmp_path, recordings):
    """Fault: adapters without a gradient, since nothing before the first checkpoint asks for one."""
    runs = [
        sft_trainer(tmp_path / str(on), recordings, peft_config=lora_config(True), gradient_checkpointing=on)
        for on in (False, True)
    ]
    for trainer in runs:
        trainer.train()
    assert largest_difference(*map(trained, runs)) < 1e-5
    assert losses(runs[0])[-1] < losses(runs[0])[0]


def test_quick_overfits_one_recording(tmp_path, recordings):
    trainer = sft_trainer(tmp_path, recordings, quick=True, max_steps=40)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * before and len(trainer.train_dataset) == 1


def test_what_cannot_work_is_refused_first(tmp_path, recordings, tiny_folder, monkeypatch):
    monkeypatch.setattr(
        "diverse_cfg.trainer.finetuning.encode_recordings", lambda *_, **__: pytest.fail("too late")
    )
    with pytest.raises(ValueError, match="train_dataset is required"):
        sft_trainer(tmp_path, None)
    with pytest.raises(ValueError, match="holds no audio"):
        sft_trainer(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"needs \d+ positions"):
        sft_trainer(tmp_path, recordings, clip_seconds=60)
    with pytest.raises(ValueError, match=r"^long: prompt 0 has \d+ tokens, the text encoder takes"):
        sft_trainer(tmp_path, [Recording("long", "sad cello " * 300, tmp_path / "a.wav")])
    with pytest.raises(ValueError, match="push_to_hub"):
        sft_args(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="modules_to_save"):
        sft_trainer(tmp_path, recordings, peft_config=LoraConfig(modules_to_save=["lm_heads"]))
    model = tiny_musicgen()
    model.is_distilled = True
    with pytest.raises(ValueError, match="distilled already: fine-tune its base"):
        sft_trainer(tmp_path, recordings, model)


def test_a_diverged_run_saves_nothing(tmp_path, recordings):
    trainer = sft_trainer(
        tmp_path, recordings, learning_rate=1e30, max_grad_norm=0.0, save_strategy="steps", save_steps=1
    )
    with pytest.raises(
        FloatingPointError, match="clip the gradient with max_grad_norm; there is no checkpoint yet"
    ):
        trainer.train()
    assert not list(tmp_path.glob("**/*.safetensors"))
