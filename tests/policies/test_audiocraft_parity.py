"""The real AudioCraft beside ours: its checkpoints in, ours out, and what both compute.

`tests/policies/test_audiocraft.py` compares with frozen numbers of the same kind where audiocraft is not
installed; here AudioCraft also has to read what we write.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from diverse_cfg.functional.codebooks import apply_delay_pattern
from diverse_cfg.merging import merge_checkpoints
from diverse_cfg.policies.audiocraft import (
    export_audiocraft,
    from_audiocraft,
    import_audiocraft,
    load_audiocraft,
    to_audiocraft,
    without_null_rows,
)
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.musicgen.model import codebook_delays
from diverse_cfg.provenance import read_provenance
from tests.policies.audiocraft_world import (
    GUIDANCE_SCALE,
    MONO,
    PROMPTS,
    STEREO,
    TRUE_WIDTH,
    VARIED,
    check_equal,
    expectation,
    greedy_codes,
    open_audiocraft,
    our_codes,
    text_encoder,
    write_checkpoint,
)
from tests.training import tiny_trainer

try:
    import_audiocraft()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SIZES = {"mono": MONO, "stereo": STEREO, "varied": VARIED}


@pytest.fixture(scope="module", params=SIZES)
def world(request, tmp_path_factory):
    """A checkpoint that AudioCraft wrote, and what AudioCraft computes from it."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("audiocraft") / "checkpoint", SIZES[request.param], seed=3
    )
    return folder, SIZES[request.param], expectation(folder, SIZES[request.param])


@torch.no_grad()  # another algorithm with a gradient, which rounds differently
def decode(live, codes):
    return live.compression_model.decode(codes, None)


def test_checkpoints_in(world):
    folder, _, expected = world
    check_equal(*load_audiocraft(folder), expected)


def test_live_models_in(world):
    """As a MusicGen, and as the pair that a training script holds, which has no configuration of its own."""
    folder, _, expected = world
    live = open_audiocraft(folder)
    check_equal(*from_audiocraft(live), expected)
    del live.lm.cfg
    model, processor = from_audiocraft((live.lm, live.compression_model))
    check_equal(model, processor, expected)
    loaded = load_audiocraft(folder)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with torch.no_grad():
        model.decoder.lm_heads[0].weight.zero_()
    assert live.lm.linears[0].weight.abs().sum() > 0, "training the copy must not change the original"


def test_how_a_live_model_plays_comes_along(world):
    folder, *_ = world
    live = open_audiocraft(folder)
    live.set_generation_params(top_k=7, temperature=0.9, cfg_coef=2.0, duration=0.4)
    settings = from_audiocraft(live)[0].generation_config
    assert (settings.top_k, settings.temperature, settings.guidance_scale) == (7, 0.9, 2.0)
    assert settings.max_new_tokens == 20 + 3
    live.set_generation_params(top_p=0.8)
    settings = from_audiocraft(live)[0].generation_config
    assert (settings.top_k, settings.top_p, settings.max_new_tokens) == (0, 0.8, 1503)


def test_live_models_out(world):
    """AudioCraft plays the converted model, and taking it in again gives back every bit."""
    folder, _, expected = world
    model, processor = load_audiocraft(folder)
    live = to_audiocraft(model, processor)
    assert torch.equal(greedy_codes(live, PROMPTS), expected["greedy_codes"])
    assert torch.equal(decode(live, expected["codes"]), expected["decoded_audio"])
    again, _ = from_audiocraft(live)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    model.generation_config.update(top_k=500, max_new_tokens=23)
    assert to_audiocraft(model, processor).generate(PROMPTS[:1]).isfinite().all(), "more than there are codes"
    model.generation_config.update(guidance_scale=1.0, top_k=0)
    live = to_audiocraft(model, processor)
    assert live.generation_params["cfg_coef"] == 1.0, (
        "AudioCraft's default would guide a distilled model again"
    )
    assert live.generation_params["top_k"] == 0
    assert live.generate(PROMPTS[:1]).shape[-1] == 20 * 64


@pytest.mark.parametrize("two_step", [False, True])
def test_a_student_takes_one_row_per_clip(world, two_step):
    """Faults: null rows that are computed at cfg_coef=1; other codes without them; a copy that plays the original's
    weights; guidance that is lost where it is asked for."""
    folder, *_ = world
    theirs, ours = open_audiocraft(folder), without_null_rows(without_null_rows(open_audiocraft(folder)))

    def play(live, scale, two_step=two_step):
        rows = []
        hook = live.lm.transformer.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
        live.set_generation_params(use_sampling=False, duration=0.4, cfg_coef=scale, two_step_cfg=two_step)
        codes, steps = live.generate(PROMPTS, return_tokens=True)[1], live.frame_rate * 0.4
        hook.remove()
        return codes, sum(rows) / len(PROMPTS) / (steps + 3)

    plain, twice = play(
        theirs, 1.0, two_step=False
    )  # in two steps AudioCraft takes the model's own coefficient
    alone, once = play(ours, 1.0)
    assert torch.equal(alone, plain) and 1.9 < twice < 2.1 and 0.9 < once < 1.1
    guided, guided_rows = play(ours, GUIDANCE_SCALE)
    assert torch.equal(guided, play(theirs, GUIDANCE_SCALE)[0]) and 1.9 < guided_rows < 2.1
    assert not torch.equal(guided, alone)
    other = copy.copy(ours)
    other.lm = copy.deepcopy(ours.lm)
    with torch.no_grad():
        other.lm.linears[0].weight.zero_()
    assert not torch.equal(play(other, 1.0)[0], alone) and torch.equal(play(ours, 1.0)[0], alone)
    assert from_audiocraft(ours)[0].num_parameters() > 0


def test_checkpoints_out(world, tmp_path):
    """AudioCraft's own loader reads what we write, and plays the same."""
    folder, _, expected = world
    model, processor = load_audiocraft(folder)
    export_audiocraft(model, tmp_path / "out", processor=processor)
    live = open_audiocraft(tmp_path / "out")
    assert torch.equal(greedy_codes(live, PROMPTS), expected["greedy_codes"])
    assert torch.equal(decode(live, expected["codes"]), expected["decoded_audio"])
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        first, second = (torch.load(path / name)["best_state"] for path in (folder, tmp_path / "out"))
        # PyTorch's own attention, where a checkpoint was trained with it, is one level deeper.
        assert all(torch.equal(tensor, second[key.replace(".mha.", ".")]) for key, tensor in first.items())


def test_a_text_encoder_that_travels_is_the_one_that_audiocraft_reads(tmp_path):
    """Named after a T5 that is another one here: its weights have to be in the checkpoint."""
    model, processor = load_audiocraft(write_checkpoint(tmp_path / "in", MONO))
    expected = our_codes(model, processor)
    export_audiocraft(model, tmp_path / "out", text_encoder="t5-small")
    other = write_checkpoint(tmp_path / "other", MONO)
    t5 = torch.load(tmp_path / "out" / "state_dict.bin")["best_state"]
    assert any(".description.t5." in key for key in t5)
    import safetensors.torch

    path = other / "text_encoder" / "model.safetensors"
    weights = {key: -2 * tensor for key, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    live = open_audiocraft(tmp_path / "out", other / "text_encoder")
    assert torch.equal(greedy_codes(live, PROMPTS), expected)
    again, _ = load_audiocraft(tmp_path / "out", text_encoder=other / "text_encoder")
    assert torch.equal(again.text_encoder.shared.weight, model.text_encoder.shared.weight)


def test_a_pretrained_codec_of_transformers(tmp_path):
    """AudioCraft wraps transformers' EnCodec where the checkpoint only names it."""
    folder = write_checkpoint(tmp_path / "in", STEREO)
    model, _ = load_audiocraft(folder)
    model.audio_encoder.save_pretrained(tmp_path / "encodec")
    expected = expectation(folder, STEREO)
    torch.save(
        {"pretrained": str(tmp_path / "encodec"), "exported": True}, folder / "compression_state_dict.bin"
    )
    check_equal(*load_audiocraft(folder), expected)
    # AudioCraft's own loader looks for an export at every path that exists; only the Hub's names go to transformers.
    from audiocraft.models import EncodecModel, HFEncodecCompressionModel, MusicGen  # noqa: F401
    from audiocraft.models.loaders import load_lm_model
    from transformers import EncodecModel as Pretrained

    with text_encoder(folder / "text_encoder"):
        language_model = load_lm_model(str(folder))
    codec = HFEncodecCompressionModel(Pretrained.from_pretrained(tmp_path / "encodec")).eval()
    live = MusicGen("live", codec, language_model)
    check_equal(*from_audiocraft(live), expected)


@pytest.mark.parametrize("stereo", [False, True])
def test_the_delay_pattern_is_audiocrafts(stereo):
    from audiocraft.modules.codebooks_patterns import DelayedPatternProvider

    delays = [0, 0, 1, 1, 2, 2, 3, 3] if stereo else [0, 1, 2, 3]
    codes = torch.arange(2 * len(delays) * 6).reshape(2, len(delays), 6)
    pattern = DelayedPatternProvider(len(delays), delays).get_pattern(6)
    expected = pattern.build_pattern_sequence(codes, 999, keep_only_valid_steps=False)[0]
    assert torch.equal(
        apply_delay_pattern(codes, 999, codebook_delays(codes.shape[1], 2 if stereo else 1)), expected
    )


@pytest.mark.slow
def test_true_width(tmp_path):
    """musicgen-small's width, heads, codes and codec, with two layers: where rounding adds up."""
    folder = write_checkpoint(tmp_path / "wide", TRUE_WIDTH)
    expected = expectation(folder, TRUE_WIDTH)
    model, processor = load_audiocraft(folder)
    check_equal(model, processor, expected, tolerance=3e-5, guided_tolerance=12e-5)
    export_audiocraft(model, tmp_path / "out", processor=processor)
    again = torch.load(tmp_path / "out" / "state_dict.bin", mmap=True)["best_state"]
    before = torch.load(folder / "state_dict.bin", mmap=True)["best_state"]
    assert before.keys() == again.keys()
    assert all(torch.equal(before[key], again[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("size", [MONO, STEREO], ids=["mono", "stereo"])
def test_train_merge_and_export(tmp_path, size):
    """Folder → train (full and LoRA) → merge → export → AudioCraft plays the codes that we play."""
    base = write_checkpoint(tmp_path / "base", size)
    students = {"full": None, "lora": LoraConfig(r=2, init_lora_weights=False)}
    for name, peft_config in students.items():
        trainer = tiny_trainer(
            tmp_path / name,
            model=str(base),
            peft_config=peft_config,
            max_steps=2,
            diversity_coef=0,
            reward=[],
        )
        assert trainer.train().global_step == 2
        trainer.save_model()
        assert read_provenance(tmp_path / name).base_model == str(base)
    for checkpoints in (["full"], ["lora"], ["full", "lora"]):
        name = "-".join(checkpoints)
        merged = merge_checkpoints([tmp_path / c for c in checkpoints], None, tmp_path / f"merged-{name}")
        model, processor = load_policy(merged), load_processor(merged)
        assert model.generation_config.guidance_scale == 1.0
        export_audiocraft(model, tmp_path / f"out-{name}", processor=processor)
        live = open_audiocraft(tmp_path / f"out-{name}", base / "text_encoder")
        for guidance_scale in (1.0, 3.0):
            played = greedy_codes(live, PROMPTS, guidance=guidance_scale)
            assert torch.equal(played, our_codes(model, processor, guidance_scale)), (name, guidance_scale)
        first, start = (m.decoder.model.decoder.layers[0].fc1.weight for m in (model, load_policy(base)))
        assert not torch.equal(first, start), "nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize("pair", [False, True], ids=["MusicGen", "LMModel and codec"])
def test_a_live_model_is_trained_and_given_back(tmp_path, pair):
    live = open_audiocraft(write_checkpoint(tmp_path / "base", MONO))
    before = {key: tensor.clone() for key, tensor in live.lm.state_dict().items()}
    source = (live.lm, live.compression_model) if pair else live
    from diverse_cfg.trainer import CFGDiversityTrainer
    from tests.training import tiny_args

    args = tiny_args(tmp_path / "student", max_steps=2, diversity_coef=0)
    trainer = CFGDiversityTrainer(source, [], args, train_dataset=PROMPTS * 2)
    trainer.train()
    trained = to_audiocraft(trainer.model, trainer.processing_class)
    assert trained.generation_params["cfg_coef"] == 1.0
    assert torch.equal(
        greedy_codes(trained, PROMPTS, guidance=1.0), our_codes(trainer.model, trainer.processing_class, 1.0)
    )
    assert all(torch.equal(before[key], tensor) for key, tensor in live.lm.state_dict().items())
    assert not torch.equal(
        before["transformer.layers.0.linear1.weight"],
        trained.lm.state_dict()["transformer.layers.0.linear1.weight"],
    )


@pytest.mark.slow
def test_importing_audiocraft_leaves_no_trace():
    """Placeholders that stay would make other libraries believe in packages that are not there; and torchaudio
    must not come in, whose CUDA build breaks transformers' MusicGen."""
    code = """
import sys
from transformers.utils import import_utils
from diverse_cfg.policies.audiocraft import import_audiocraft
import_audiocraft()
import importlib.util
left = [n for n, m in sys.modules.items() if type(m).__name__ == "_Placeholder"]
assert left in ([], ["xformers"]), left
for name in ("torchaudio", "av", "librosa", "spacy"):
    assert (importlib.util.find_spec(name) is not None) == (name in sys.modules), name
for check in ("is_librosa_available", "is_torchaudio_available", "is_av_available"):
    name = check.removeprefix("is_").removesuffix("_available")
    assert getattr(import_utils, check)() == (importlib.util.find_spec(name) is not None), check
import sentence_transformers
from transformers.models.musicgen import modeling_musicgen
from audiocraft.modules.chroma import ChromaExtractor
try:
    ChromaExtractor(sample_rate=32000)
except ImportError as error:
    assert "torchaudio.transforms" in str(error) or "librosa" in str(error), error
else:
    assert importlib.util.find_spec("torchaudio")
print("clean")
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert result.stdout.strip() == "clean", result.stderr[-2000:]


def test_causality_survives_the_placeholder_of_xformers(tmp_path):
    """audiocraft's memory-efficient attention is causal only if xformers' mask is an object."""
    model, processor = load_audiocraft(write_checkpoint(tmp_path / "in", MONO))
    export_audiocraft(model, tmp_path / "out", processor=processor)
    live = open_audiocraft(tmp_path / "out")
    assert live.lm.transformer.layers[0].self_attn.memory_efficient
    from tests.policies.audiocraft_world import logits

    codes = torch.randint(0, 16, (1, 4, 8), generator=torch.Generator().manual_seed(0))
    changed = codes.clone()
    changed[..., -1] = (changed[..., -1] + 1) % 16
    first, second = logits(live, codes, PROMPTS[:1]), logits(live, changed, PROMPTS[:1])
    torch.testing.assert_close(first[:, :, :4], second[:, :, :4], atol=1e-6, rtol=0)
