"""What is saved is what was trained, for every kind of first stage; and the teacher stays the base."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoftQConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import MusicgenForConditionalGeneration, TrainerCallback, pipeline

from diverse_cfg.functional.guidance import guided_logits
from diverse_cfg.merging import merge_checkpoints
from diverse_cfg.policies.checkpoints import open_checkpoint
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.musicgen.model import code_logits, encode_text
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.provenance import Provenance, read_provenance, write_provenance
from diverse_cfg.publishing.plan import check_loads, plan_upload
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer
from diverse_cfg.trainer.teacher import fingerprint
from tests import checkpoints as made
from tests.checkpoints import teacher_forced_logits
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor
from tests.training import CodeEmbedder, tiny_args, tiny_trainer, trained

AUDIOCRAFT = Path(__file__).parent / "policies" / "data" / "audiocraft" / "mono"
# A scaling that is no power of two, layers that stage 1 adapts and others, two ranks.
LORA = LoraConfig(
    r=2, lora_alpha=3, target_modules=["q_proj", "fc2", "embed_tokens.1"], rank_pattern={"fc2": 1}
)
SECOND = {"full": None, "lora": LORA}
FIRST = ["base", "full1", "lora1", "merged-full", "merged-adapter", "audiocraft", "live"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    folders = {"base": made.make_base(root / "base")}
    for seed in (1, 2):
        shared = ("audio_encoder.", "text_encoder.")
        folders[f"full{seed}"] = made.make_full(root / f"full{seed}", folders["base"], seed, shared)
        lora = made.LORA1 if seed == 1 else made.LORA2
        folders[f"lora{seed}"] = made.make_adapter(root / f"lora{seed}", folders["base"], seed, **lora)
        for kind in ("full", "lora"):
            write_provenance(folders[f"{kind}{seed}"], Provenance("student", guidance_scale=3.0))
    for kind, sources in {"full": ("full1", "full2"), "adapter": ("lora1", "lora2")}.items():
        folders[f"merged-{kind}"] = root / f"merged-{kind}"
        merge_checkpoints([folders[s] for s in sources], 0.3, root / f"merged-{kind}", format=kind)
    shutil.copytree(AUDIOCRAFT, root / "audiocraft")
    folders["audiocraft"] = root / "audiocraft"
    return folders


def first_stage(world, name):
    """What a user passes as `model`, and the settings that go with it."""
    if name == "live":  # frozen by PEFT, which merged it
        model = load_policy(world["lora1"])
        assert not any(p.requires_grad for p in model.parameters())
    else:
        model = str(world[name])
    own_teacher = name in ("base", "audiocraft")
    return model, {} if own_teacher else {"teacher_model": str(world["base"])}


def stage(folder, model, peft_config=None, steps=2, **settings):
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, **settings}
    return CFGDiversityTrainer(
        model,
        DiversityReward(CodeEmbedder()),
        tiny_args(folder, **settings),
        train_dataset=PROMPTS,
        processing_class=None if isinstance(model, str) else tiny_processor(),
        peft_config=peft_config,
    )


def close(model, wanted):
    torch.testing.assert_close(teacher_forced_logits(model), wanted, atol=2e-5, rtol=0)


# LoRA on a live LoRA student is refused, see below.
@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in itertools.product(FIRST, SECOND) if pair != ("live", "lora")]
)
def test_what_a_second_stage_saves_is_what_it_trained(world, tmp_path, recwarn, first, second):
    """Fault: an adapter saved for a base that it was not trained on; a student that stays frozen; a checkpoint
    that is another model than the run had, or resumes as another."""
    model, settings = first_stage(world, first)
    trainer = stage(tmp_path / "run", model, SECOND[second], **settings)
    start = trained(trainer)
    before = teacher_forced_logits(trainer.model.eval())
    trainer.train()
    folder = tmp_path / "student"
    trainer.save_model(str(folder))
    assert not [w for w in recwarn if "config file" in str(w.message)]  # PEFT's, about a vocabulary
    wanted = teacher_forced_logits(trainer.model.eval())
    assert (wanted - before).abs().max() > 1e-3, "nothing was trained"
    unmoved = [name for name, p in trained(trainer).items() if torch.equal(p, start[name])]
    assert not unmoved or (second == "full" and all("bias" in name for name in unmoved))

    close(load_policy(folder), wanted)
    close(load_policy(tmp_path / "run" / "checkpoint-2"), wanted)
    check_loads(folder)
    merged = merge_checkpoints([folder], None, tmp_path / "merged")
    close(MusicgenForConditionalGeneration.from_pretrained(merged), wanted)
    base_model = "user/base" if second == "lora" else None
    plan_upload(folder, "me/m", license=made.LICENSE, base_model=base_model)
    if second == "lora":
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        is_student = first in ("lora1", "merged-adapter")
        assert named == str(world["base"] if is_student else world[first])
        included = read_provenance(folder).training["includes_adapter"]
        assert included == (str(world[first]) if is_student else None)
        if first != "audiocraft":
            onto = MusicgenForConditionalGeneration.from_pretrained(named)
            close(PeftModel.from_pretrained(onto, folder), wanted)
            close(pipeline("text-to-audio", model=str(folder), processor=None).model, wanted)

    if second == "full" and first not in ("lora1", "live"):
        return  # test_trainer_trajectories.py resumes such runs
    model, settings = first_stage(world, first)
    resumed = stage(tmp_path / "run", model, SECOND[second], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(p, trained(trainer)[name]) for name, p in trained(resumed).items())


def test_the_best_checkpoint_of_a_second_lora_stage_comes_back(world, tmp_path):
    """Fault: both adapters' factors loaded into the run's own."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = CFGDiversityTrainer(
        str(world["lora1"]),
        DiversityReward(CodeEmbedder()),
        tiny_args(
            tmp_path, save_strategy="steps", save_steps=1, teacher_model=str(world["base"]), **settings
        ),
        PROMPTS,
        PROMPTS,
        peft_config=LORA,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    wanted = teacher_forced_logits(trainer.model.eval())
    close(load_policy(best), wanted)
    third = stage(tmp_path / "third", best, LORA, teacher_model=str(world["base"]))
    third.save_model()
    close(load_policy(tmp_path / "third"), wanted)
    trainer.model.save_pretrained(tmp_path / "bare")  # what the run itself trained, an adapter of its start
    named = json.loads((tmp_path / "bare" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(world["lora1"])


def test_averaged_weights_of_a_second_lora_stage(world, tmp_path):
    """Fault: the raw factors in the folder that should hold the average."""
    trainer = stage(tmp_path, str(world["lora1"]), LORA, teacher_model=str(world["base"]), ema_decay=0.9)
    trainer.train()
    trainer.save_model()
    close(load_policy(tmp_path), teacher_forced_logits(trainer.model.eval()))


def test_a_checkpoint_of_another_start_is_refused(world, tmp_path):
    """Fault: a run that is resumed with other models goes on, from another base or towards another teacher."""
    settings = {"teacher_model": str(world["base"])}
    stage(tmp_path / "lora", str(world["lora1"]), LORA, steps=1, **settings).train()
    wrong = stage(tmp_path / "lora", str(world["merged-adapter"]), LORA, **settings)
    with pytest.raises(
        ValueError,
        match=r"began with the model lora1, and this one begins with other weights, those of merged-adapter",
    ):
        wrong.train(resume_from_checkpoint=True)
    stage(tmp_path / "full", str(world["full1"]), steps=1, **settings).train()
    wrong = stage(tmp_path / "full", str(world["full1"]), teacher_model=str(world["full2"]), guidance_scale=1)
    with pytest.raises(ValueError, match="another teacher or base"):
        wrong.train(resume_from_checkpoint=True)


def test_checkpoints_of_a_second_lora_stage_that_hold_its_own_factors_resume(world, tmp_path):
    """Fault: checkpoints written before both adapters were saved as one no longer resume."""
    settings = {"teacher_model": str(world["base"])}
    trainer = stage(tmp_path, str(world["lora1"]), LORA, **settings)
    trainer.train()
    older = stage(tmp_path, str(world["lora1"]), LORA, **settings)
    older._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    older.model.save_pretrained(tmp_path / "checkpoint-1")
    resumed = stage(tmp_path, str(world["lora1"]), LORA, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(p, trained(trainer)[name]) for name, p in trained(resumed).items())


# ---- refused before training -----------------------------------------------------------------------------


def test_what_no_adapter_can_hold_is_refused_before_training(world, tmp_path):
    """Fault: LoRA on a student whose adapter replaces whole layers, saved without them."""
    with_heads = made.make_adapter(
        tmp_path / "s", world["base"], 3, r=2, target_modules=["q_proj"], modules_to_save=["lm_heads.0"]
    )
    settings = {"teacher_model": str(world["base"])}
    with pytest.raises(ValueError, match=r"lm_heads.0.weight is trained whole.*train all weights"):
        stage(tmp_path / "a", str(with_heads), LORA, **settings)
    whole = LoraConfig(r=2, modules_to_save=["lm_heads.1"])
    with pytest.raises(ValueError, match=r"lm_heads.1 is trained whole"):
        stage(tmp_path / "a", str(world["lora1"]), whole, **settings)
    trainer = stage(tmp_path / "full", str(with_heads), steps=1, **settings)
    assert sum(p.requires_grad for p in trainer.model.decoder.parameters()) == len(
        list(trainer.model.decoder.parameters())
    )


def test_a_live_model_that_is_not_the_base_it_names_is_refused(world, tmp_path):
    """Fault: `load_policy` of a LoRA student names the student's base, and so would the next adapter."""
    settings = {"teacher_model": str(world["base"])}
    with pytest.raises(
        ValueError, match="has other weights, and the adapter would be saved for the wrong base"
    ):
        stage(tmp_path, load_policy(world["lora1"]), LORA, **settings)
    stage(tmp_path, load_policy(world["full1"]).half(), LORA, guidance_scale=1)  # its folder's, rounded
    unknown = load_policy(world["full1"])
    unknown.config._name_or_path = "somebody/gone"
    with pytest.warns(UserWarning, match="somebody/gone as its base, which could not be compared"):
        stage(tmp_path, unknown, LORA, **settings)


def test_adapters_inside_a_live_model_are_refused(tmp_path):
    inside = tiny_trainer(tmp_path, peft_config=LORA).model.get_base_model()
    with pytest.raises(ValueError, match="still has adapters inside"):
        tiny_trainer(tmp_path, model=inside)


def test_the_start_is_not_written_over(world, tmp_path):
    """Fault: a second stage into its own start's folder, which a resumed run would begin from."""
    start = made.copy(world["full1"], tmp_path / "run" / "checkpoint-3")
    settings = {"teacher_model": str(world["base"])}
    for folder in (start, start.parent):
        with pytest.raises(
            ValueError, match=r"would write over the model .*checkpoint-3.*another output_dir"
        ):
            stage(folder, str(start), **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({"init_lora_weights": name}, f"init_lora_weights='{name}'")
            for name in ("pissa", "pissa_niter_4", "OLoRA", "corda", "lora_ga")
        ],
        ({"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}, "init_lora_weights='loftq'"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "wi_0"]}, "text_encoder.*would be trained"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["shared"]}, "text_encoder.*would be trained"),
    ],
)
def test_adapters_that_change_the_teacher_are_refused(tmp_path, options, message):
    """Fault: "adapters disabled" is no longer the base: the teacher is nats off before the first step."""
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, **options))


def test_an_initialisation_that_nobody_listed_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("diverse_cfg.trainer.setup.inexact_options", lambda config: [])
    with pytest.raises(ValueError, match=r"weights of the frozen base changed .*init_lora_weights=True"):
        tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, init_lora_weights="pissa"))


def test_a_layer_shared_with_the_text_encoder_is_refused(tmp_path):
    model = tiny_musicgen()
    attention = model.text_encoder.encoder.block[0].layer[0].SelfAttention
    model.decoder.model.decoder.layers[0].shared = attention.q
    with pytest.raises(ValueError, match="would be trained, but the teacher reads it too"):
        tiny_trainer(tmp_path, model=model)


# ---- the teacher -----------------------------------------------------------------------------------------


class Meddler(TrainerCallback):
    """Changes one value of the teacher, as a callback that resets or merges weights may."""

    def __init__(self):
        self.victim = None

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.victim.view(-1)[0] += 1e-6


@pytest.mark.parametrize(("lora", "at"), [(False, "evaluation"), (True, "evaluation"), (True, "save")])
def test_a_teacher_that_changes_is_noticed(tmp_path, lora, at):
    """Fault: distillation towards a model that moves, in a log that looks healthy."""
    settings = (
        {"eval_strategy": "steps"} if at == "evaluation" else {"save_strategy": "steps", "save_steps": 2}
    )
    meddler = Meddler()
    trainer = CFGDiversityTrainer(
        tiny_musicgen(),
        [],
        tiny_args(tmp_path, diversity_coef=0.0, **settings),
        PROMPTS,
        PROMPTS,
        processing_class=tiny_processor(),
        callbacks=[meddler],
        peft_config=LORA if lora else None,
    )
    with trainer._teacher.frozen() as teacher:
        meddler.victim = teacher.model.decoder.lm_heads[2].weight
    with pytest.raises(
        ValueError, match=r"1 weights of the frozen base changed .*decoder\.lm_heads\.2\.weight"
    ):
        trainer.train()
    assert trainer.state.global_step == (1 if at == "evaluation" else 2)


@pytest.mark.parametrize("second", SECOND)
def test_sharded_students_are_not_compared(tmp_path, second):
    """Fault: DeepSpeed's own precision of a student passes for a teacher that changed."""
    trainer = tiny_trainer(tmp_path, peft_config=SECOND[second])
    trainer.is_deepspeed_enabled = True
    trainer._housekeeping.begin()
    trainer.model.to(torch.bfloat16)
    trainer._frozen.check("")
    assert len(trainer._frozen.policies) == (second == "full")


@pytest.mark.parametrize("first", ["base", "lora1"])
def test_an_adapter_knows_that_its_base_was_trained_again(world, tmp_path, first):
    """Fault: the adapter of a model that no longer exists, on whatever lies in its folder now."""
    base = made.copy(world["base"], tmp_path / "base")
    model, settings = base, {}
    if first == "lora1":
        model, settings = made.copy(world[first], tmp_path / "first"), {"teacher_model": str(base)}
        config = json.loads((model / "adapter_config.json").read_text()) | {
            "base_model_name_or_path": str(base)
        }
        (model / "adapter_config.json").write_text(json.dumps(config))
    student = stage(tmp_path / "student", str(model), LORA, steps=1, **settings)
    student.train()
    student.save_model()
    assert load_policy(tmp_path / "student")
    weights, config = load_file(base / made.MODEL), json.loads((base / "config.json").read_text())
    name = "decoder.model.decoder.layers.0.fc1.weight"
    part = weights[name].clone()
    part[len(part) // 2 :] *= 1.1
    heads = config["decoder"] | {"num_attention_heads": 1}
    for tensors, settings in (({name: part}, {}), ({}, {"decoder": heads})):
        save_file(weights | tensors, base / made.MODEL, metadata={"format": "pt"})
        (base / "config.json").write_text(json.dumps(config | settings))
        for load in (load_policy, open_checkpoint):
            with pytest.raises(ValueError, match=r"base .*base', whose weights have changed since: put"):
                load(tmp_path / "student")
    save_file(weights, base / made.MODEL, metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}, indent=1))
    assert open_checkpoint(tmp_path / "student").fingerprint()


def test_the_fingerprint_sees_every_weight_and_no_adapter(tmp_path):
    """Fault: a fingerprint that a swap of threads changes, or that a change escapes."""
    model = tiny_musicgen()
    policy = as_policy(model)
    before = fingerprint(policy)
    for name, parameter in model.named_parameters():
        if not name.startswith("audio_encoder."):
            value = parameter.data.view(-1)[-1].clone()
            parameter.data.view(-1)[-1] = torch.nextafter(value, value + 1)
            assert [key for key, found in fingerprint(policy).items() if found != before[key]] == [name]
            parameter.data.view(-1)[-1] = value
    trainer = tiny_trainer(tmp_path, model=model, peft_config=LORA)
    trainer.train()
    after = fingerprint(policy)
    assert {name: after[name] for name in before} == before


def test_a_live_student_has_the_teacher_that_was_named(world, tmp_path):
    """Fault: a live LoRA student carries its base's name, so that "the same model" makes the student itself, which
    is distilled, the guided teacher of its next stage."""
    trainer = stage(tmp_path, load_policy(world["lora1"]), teacher_model=str(world["base"]))
    base = load_policy(world["base"])
    condition = encode_text(base, load_processor(world["base"]), PROMPTS)
    codes = torch.randint(0, 16, (4, 4, 7), generator=torch.Generator().manual_seed(0))
    wanted = guided_logits(
        code_logits(base, codes, condition), code_logits(base, codes, condition.null()), 3.0
    )
    found = trainer._teacher(codes, condition)
    guided = found.uncond_hidden_states + 3 * (found.cond_hidden_states - found.uncond_hidden_states)
    cells = [guided[:, k : k + 7] @ found.head_weights[k].T for k in range(4)]
    torch.testing.assert_close(torch.stack(cells, dim=1), wanted, atol=1e-4, rtol=0)


def test_an_equal_teacher_is_not_held_twice(world, tmp_path):
    copy = made.copy(world["base"], tmp_path / "copy")
    trainer = stage(tmp_path / "run", str(world["base"]), LORA, teacher_model=str(copy))
    assert trainer._teacher.shares_weights


# ---- live models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("second", "dtype"), [("full", torch.bfloat16), ("lora", torch.float16)])
def test_a_live_model_in_half_precision_is_trained_in_float32(world, tmp_path, second, dtype):
    """Fault: steps of 3e-6 vanish in the rounding of bfloat16, and .3 % of the weights move."""
    model = load_policy(world["base"]).to(dtype)
    trainer = stage(tmp_path, model, SECOND[second], steps=2, learning_rate=3e-6)
    before = trained(trainer)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    after = trained(trainer)
    moved = sum(int((after[name] != before[name]).sum()) for name in before)
    assert moved > 0.9 * sum(p.numel() for p in before.values())
    trainer.save_model()
    if second == "full":
        saved = MusicgenForConditionalGeneration.from_pretrained(tmp_path)
        assert saved.decoder.dtype == torch.float32
        close(saved, teacher_forced_logits(trainer.model.eval()))


def test_a_decoder_that_is_frozen_in_part_stays_so_and_says_so(tmp_path):
    """Fault: half a decoder frozen by another program, and nobody notices; or a user's choice undone."""
    model = tiny_musicgen()
    model.decoder.lm_heads.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"4 of \d+ weights of the decoder are frozen.*lm_heads.0.weight"):
        trainer = tiny_trainer(tmp_path, model=model)
    assert not any("lm_heads" in name for name in trained(trainer))


def test_a_tokenizer_alone_is_saved_with_the_models_processor(world, tmp_path):
    """Fault: a student whose folder lacks the processor of its own clips."""
    tokenizer = load_processor(world["base"]).tokenizer
    trainer = CFGDiversityTrainer(
        str(world["base"]),
        DiversityReward(CodeEmbedder()),
        tiny_args(tmp_path),
        PROMPTS,
        processing_class=tokenizer,
    )
    trainer.save_model()
    features = load_processor(tmp_path).feature_extractor
    assert (features.sampling_rate, features.feature_size) == (3200, 1)
