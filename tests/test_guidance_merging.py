"""γ and λ together: merging students that are told γ, one γ folded in, and both as knobs of one model."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from diverse_cfg.cards import render_card
from diverse_cfg.cli import main
from diverse_cfg.evaluation.sweep import kept_codes
from diverse_cfg.evaluation.systems import System, single
from diverse_cfg.functional.guidance import GuidanceRange
from diverse_cfg.merging import format_report, inspect_checkpoint, load_slider, merge_checkpoints, merge_sweep
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.policies.sampler.rollout import fast_generate
from diverse_cfg.policies.shift import SHIFT_FILE, GuidanceShift
from diverse_cfg.provenance import read_provenance
from tests import checkpoints as made
from tests.checkpoints import edit_json
from tests.evaluation.worlds import small_sweep
from tests.tiny import PROMPTS, tiny_processor

BIAS = "enc_to_dec_proj.bias"
RANGES = {"full1": {"low": 1, "high": 5}, "lora1": {"low": 1, "high": 5}, "lora2": [1, 3, 4]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two adapters and a full model that are told γ; `full2` was trained for one."""
    folders = made.make_world(tmp_path_factory.mktemp("guidance"))
    for seed, (name, value) in enumerate(RANGES.items()):
        guidance = GuidanceRange.of(value)
        rows = torch.randn(len(guidance.knots), 16, generator=torch.Generator().manual_seed(seed))
        GuidanceShift.of(guidance, rows).save(folders[name])
        ends = [guidance.knots[0], guidance.knots[-1]]
        edit_json(folders[name] / "diverse_cfg.json", guidance_range=ends)
    return folders


def shift_of(folder, scale):
    """By NumPy's interpolation of the stored table, its value at γ = 3 taken off."""
    tensors = load_file(folder / SHIFT_FILE)
    table, knots = tensors["table"].double().numpy(), tensors["knots"].numpy()
    at = [np.array([np.interp(x, knots, column) for column in table.T]) for x in (scale, 3.0)]
    return torch.from_numpy(at[0] - at[1])


def test_a_baked_checkpoint_is_an_ordinary_one(world, tmp_path):
    """Alone and mixed; fault: a weight that is forgotten, a table that stays, a card that still names the range."""
    bias = load_file(world["base"] / made.MODEL)[BIAS].double()
    full = load_file(world["full1"] / made.MODEL)[BIAS].double()
    for name, experts, weights, wanted in (
        ("alone", ["full1"], None, full + shift_of(world["full1"], 2.3)),
        ("lora", ["lora1"], None, bias + shift_of(world["lora1"], 2.3)),
        (
            "mixed",
            ["lora1", "lora2", "full1"],
            [0.5, 0.3, 0.2],
            0.8 * bias
            + 0.2 * full
            + 0.5 * shift_of(world["lora1"], 2.3)
            + 0.3 * shift_of(world["lora2"], 2.3)
            + 0.2 * shift_of(world["full1"], 2.3),
        ),
        ("with another", ["lora1", "base"], 0.25, bias + 0.75 * shift_of(world["lora1"], 2.3)),
    ):
        folder = merge_checkpoints([world[e] for e in experts], weights, tmp_path / name, bake_guidance=2.3)
        found = load_file(folder / made.MODEL)[BIAS].double()
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
        assert not (folder / SHIFT_FILE).exists()
        provenance = read_provenance(folder)
        assert (provenance.guidance_scale, provenance.guidance_range) == (2.3, None)
        assert as_policy(load_policy(folder)).shift is None


@pytest.mark.parametrize("format", ["full", "adapter"])
def test_a_merge_keeps_the_range(world, tmp_path, format):
    """Told γ it plays what is baked at γ. Fault: tables mixed at the wrong knots."""
    pair = [world["lora1"], world["lora2"]]
    merge_checkpoints(pair, 0.3, tmp_path / "told", format=format)
    told = as_policy(load_policy(tmp_path / "told"), tiny_processor())
    assert read_provenance(tmp_path / "told").guidance_range == [1, 4]
    assert told.shift.guidance.knots == (1, 2, 3, 4)
    codes = torch.zeros(1, 4, 6, dtype=torch.long)
    for scale in (1.0, 1.7, 3.0, 4.0):
        merge_checkpoints(pair, 0.3, tmp_path / f"baked{scale}", bake_guidance=scale)
        baked = as_policy(load_policy(tmp_path / f"baked{scale}"), tiny_processor())
        condition = told.encode_text(["sad cello"])
        wanted = baked.code_logits(codes, condition)
        torch.testing.assert_close(
            told.code_logits(codes, condition.told(scale)), wanted, atol=1e-5, rtol=1e-5
        )


def test_the_slider_over_the_grid_plays_the_baked_merges(world, tmp_path):
    """Weights to the bit and equal codes, in any order of the knobs; three experts, one of a single γ."""
    trio = [world["lora1"], world["lora2"], world["full2"]]
    slider = load_slider(world["base"], trio)
    assert slider.guidance_range == (1, 4)
    settings = {"processor": tiny_processor(), "num_frames": 6, "seed": 1, "decode": False}
    for turn, (weights, scale) in enumerate(
        [([0.2, 0.5, 0.3], 2.3), ([1, 0, 0], 2.3), ([1, 0, 0], 4), ([0, 0, 1], 1), ([0.2, 0.5, 0.3], None)]
    ):
        for knob in ((0, 1), (1, 0))[turn % 2]:
            slider.set_guidance(scale) if knob else slider.set_merge_weight(weights)
        assert (slider.merge_weight, slider.student_guidance) == (weights, scale)
        merged = merge_checkpoints(trio, weights, tmp_path / str(turn), bake_guidance=scale)
        state = slider.model.state_dict()
        for name, tensor in load_file(merged / made.MODEL).items():
            assert torch.equal(state[name], tensor), name
        codes = [
            fast_generate(model, "sad cello", **settings).codes
            for model in (slider.model, load_policy(merged))
        ]
        assert torch.equal(*codes)
    slider.set_merge_weight({"full2": 0.25, "lora1": 0.75})
    assert slider.merge_weight == [0.75, 0, 0.25]
    before = {name: tensor.clone() for name, tensor in slider.model.state_dict().items()}
    for wrong in (4.5, 0.5, "3"):
        with pytest.raises(ValueError, match="from 1 to 4"):
            slider.set_guidance(wrong)
    with pytest.raises(ValueError, match="no expert 'full'"):
        slider.set_merge_weight({"full": 1.0})
    assert all(torch.equal(tensor, before[name]) for name, tensor in slider.model.state_dict().items())
    assert load_slider(None, trio, student_guidance=2).student_guidance == 2


def test_one_student_told_is_the_same_as_baked(world, tmp_path):
    """`fast_generate(student_guidance)`, the command and the merge: the same codes; transformers plays the last."""
    baked = load_policy(merge_checkpoints([world["lora1"]], None, tmp_path / "baked", bake_guidance=2.3))
    settings = {"processor": tiny_processor(), "num_frames": 10, "seed": 0, "top_k": 250, "decode": False}
    found = fast_generate(load_policy(world["lora1"]), "sad cello", student_guidance=2.3, **settings)
    assert torch.equal(found.codes, fast_generate(baked, "sad cello", **settings).codes)
    music, rows = pipeline("text-to-audio", model=str(tmp_path / "baked")), []
    music.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    music("sad cello")
    assert set(rows) == {4}, "a row for each codebook of one clip, and none for the null prompt"
    rest = ["--prompt", "sad cello", "--seconds", "0.2"]
    for name, model, more in (
        ("told", ["--model", str(world["lora1"])], ["--student-guidance", "2.3"]),
        ("plain", ["--model", str(tmp_path / "baked")], []),
    ):
        assert main(["generate", *model, *rest, *more, "--output", str(tmp_path / name)]) == 0
    told, plain = (
        json.loads((tmp_path / name / "generations.json").read_text()) for name in ("told", "plain")
    )
    assert told["model"].endswith("student γ 2.3")
    [wav] = (tmp_path / "told").glob("*.wav")
    assert wav.read_bytes() == (tmp_path / "plain" / wav.name).read_bytes()
    assert told["weights"] == plain["weights"]


def test_command_line(world, tmp_path, capsys):
    """A sweep of λ at one γ, and every refusal in one line that names the range."""
    pair = [str(world["lora1"]), str(world["lora2"])]
    sweep = ["merge", *pair, "--sweep", "0:1:0.5", "-o", str(tmp_path / "sweep"), "--bake-guidance"]
    assert main([*sweep, "2"]) == 0
    assert main([*sweep, "2"]) == 0
    assert main([*sweep, "1.5"]) == 2
    assert "not made by this sweep" in capsys.readouterr().err
    merges = merge_sweep(pair, [0, 0.5, 1], tmp_path / "sweep", bake_guidance=2)
    assert all(read_provenance(folder).guidance_scale == 2 for folder in merges)
    out = ["-o", str(tmp_path / "wrong")]
    rest = ["--prompt", "a", "--output", out[1]]
    for words, said in (
        (["merge", *pair, *out, "--bake-guidance", "5"], "from 1 to 4"),
        (["merge", *pair, *out, "--bake-guidance", "2", "--format", "adapter"], "format='full'"),
        (["merge", str(world["full2"]), *out, "--bake-guidance", "2"], "for one γ"),
        (
            ["generate", "--model", pair[0], *rest, "--student-guidance", "7"],
            "1 to 5",
        ),
        (
            ["generate", "--model", str(world["full2"]), *rest, "--student-guidance", "2"],
            "for one γ",
        ),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()


def test_ranges_that_do_not_fit_are_named(world, tmp_path):
    other = made.copy(world["full1"], tmp_path / "other")
    guidance = GuidanceRange.of({"low": 3.5, "high": 8})
    GuidanceShift.of(guidance, torch.zeros(len(guidance.knots), 16)).save(other)
    with pytest.raises(ValueError, match=r"1 to 5 and 3.5 to 8.*--bake-guidance"):
        merge_checkpoints([world["full1"], other], 0.5, tmp_path / "merged")
    merge_checkpoints([world["full1"], other], 0.5, tmp_path / "merged", bake_guidance=4)
    (other / SHIFT_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"from 1 to 5, but has no {SHIFT_FILE}"):
        load_policy(other)


def test_what_it_says_of_itself(world, tmp_path):
    merge_checkpoints([world["full1"]], None, tmp_path / "student")
    report = inspect_checkpoint(tmp_path / "student")
    assert report["guidance_range"] == [1, 5]
    assert "can be told γ from  1 to 5" in format_report(report)
    card = render_card(tmp_path / "student")
    assert "told γ, from 1 to 5" in card
    assert "student_guidance=5" in card
    assert "plays γ = 3" in card
    folder = merge_checkpoints([world["full1"]], None, tmp_path / "baked", bake_guidance=2)
    assert "told" not in render_card(folder)


def test_a_sweep_tells_a_student_its_guidance(world, tmp_path):
    """Codes of a system are those of the told student; another γ is another entry of the cache."""
    sweep = small_sweep(tmp_path)
    lora = single(world["lora1"])
    systems = [System(f"γ {scale}", lora, student_guidance=scale) for scale in (None, 2.3, 9.0)]
    found = sweep.run(systems, progress=False)
    model = load_policy(world["lora1"])
    for system in systems[:2]:
        told = fast_generate(
            model, PROMPTS, processor=tiny_processor(), num_frames=12, seed=0, num_generations=3, decode=False,
            student_guidance=system.student_guidance,
        )  # fmt: skip
        assert (kept_codes(system, sweep) == told.codes.numpy()).all()
    assert "from 1 to 5" in found["γ 9.0"].error
