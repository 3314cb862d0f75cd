"""The slider is the merged checkpoint, to the bit, at every weight and in any order of weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diverse_cfg.merging import load_slider, merge_checkpoints
from diverse_cfg.policies.loading import load_policy
from tests import checkpoints as made


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made.make_world(tmp_path_factory.mktemp("slider"))


def assert_is_merge(slider, merged):
    """Weights to the bit, and the logits of the same model loaded from disk."""
    state = slider.model.state_dict()
    for name, tensor in load_file(merged / made.MODEL).items():
        assert torch.equal(state[name], tensor), name
    expected = made.teacher_forced_logits(load_policy(merged))
    assert torch.equal(made.teacher_forced_logits(slider.model), expected)


def test_slider_equals_merged_checkpoints(world, tmp_path):
    """Catches drift (weights added on top of the last ones) and a layer that the second setting forgets."""
    pair = [world["lora1"], world["lora2"]]
    slider = load_slider(world["base"], pair, merge_weight=0.9)
    for weight in (0.3, 1.0, 0.0, 0.3, [0.25, 0.75]):
        slider.set_merge_weight(weight)
        name = str(weight).replace(" ", "")
        merged = tmp_path / name
        if not merged.exists():
            merge_checkpoints(pair, weight, merged)
        assert_is_merge(slider, merged)
    slider.set_merge_weight([1.5, -0.5], extrapolate=True)
    assert_is_merge(slider, merge_checkpoints(pair, [1.5, -0.5], tmp_path / "beyond", extrapolate=True))


def test_more_than_two_experts_of_any_kind(world, tmp_path):
    """Three experts, a full model and the base among them; the adapters' own base is found."""
    trio = [world["lora1"], world["full2"], world["base"]]
    slider = load_slider(None, trio)
    assert slider.names == ["lora1", "full2", "base"]
    assert slider.merge_weight == [1 / 3] * 3
    slider.set_merge_weight([0.5, 0.2, 0.3])
    assert_is_merge(slider, merge_checkpoints(trio, [0.5, 0.2, 0.3], tmp_path / "m"))


def test_a_refused_weight_changes_nothing(world):
    slider = load_slider(world["base"], [world["lora1"], world["lora2"]], merge_weight=0.4)
    before = {name: tensor.clone() for name, tensor in slider.model.state_dict().items()}
    for weight in (1.5, float("nan"), [0.5, 0.6], [1.0]):
        with pytest.raises(ValueError, match="weight"):
            slider.set_merge_weight(weight)
    assert slider.merge_weight == [0.6, 0.4]
    assert all(torch.equal(tensor, before[name]) for name, tensor in slider.model.state_dict().items())


def test_nothing_is_read_again(world, monkeypatch):
    """Catches a slider that reloads: after loading, the folders may even be gone."""
    from diverse_cfg.policies import stored

    slider = load_slider(world["base"], [world["lora1"], world["full2"]])

    def gone(info):
        raise AssertionError(f"{info.file} was read again")

    monkeypatch.setattr(stored, "read_tensor", gone)
    slider.set_merge_weight(0.2)


def test_it_plays_without_guidance_and_follows_a_moved_model(world):
    """The base's guidance of 3 must not come back, and a model cast elsewhere is still the one that is
    set."""
    slider = load_slider(world["base"], [world["lora1"], world["lora2"]], merge_weight=0.0)
    assert slider.model.generation_config.guidance_scale == 1.0
    assert slider.model.generation_config.max_new_tokens == 17 + 3
    assert slider.model.is_distilled, "so that guiding it is answered with a warning"
    slider.model.to(torch.float64)
    before = made.teacher_forced_logits(slider.model)
    slider.set_merge_weight(1.0)
    assert (made.teacher_forced_logits(slider.model) - before).abs().max() > 1e-3


def test_broken_experts_are_found_when_they_are_loaded(world, tmp_path):
    """At a weight of 0 nobody would notice; later the model would be left half changed."""
    broken = made.copy(world["lora2"], tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_slider(world["base"], [world["lora1"], broken], merge_weight=0.0)


def test_one_expert_is_no_slider(world):
    with pytest.raises(ValueError, match="at least two"):
        load_slider(world["base"], [world["lora1"]])


def test_generate_with_a_merge_weight(world, tmp_path, capsys):
    """The command's clips are the merged checkpoint's; catches weights handed to the wrong expert."""
    from diverse_cfg.cli import main

    merged = merge_checkpoints([world["lora1"], world["lora2"]], 0.3, tmp_path / "merged")
    rest = ["--prompt", "sad cello", "--seed", "3", "--num-generations", "2", "--seconds", "0.2"]
    experts = ["--adapter", str(world["lora1"]), "--adapter", str(world["lora2"])]
    mixed = ["generate", "--model", str(world["base"]), *experts, *rest]
    assert main([*mixed, "--merge-weight", "0.3", "--output", str(tmp_path / "slider")]) == 0
    assert main(["generate", "--model", str(merged), *rest, "--output", str(tmp_path / "merged-clips")]) == 0
    clips = sorted((tmp_path / "slider").glob("*.wav"))
    assert len(clips) == 2
    for clip in clips:
        assert clip.read_bytes() == (tmp_path / "merged-clips" / clip.name).read_bytes()
    for wrong in ([], ["--merge-weight", "0.5", "0.6"], ["--merge-weight", "1.5"]):
        assert main([*mixed, *wrong, "--output", str(tmp_path / "wrong")]) == 2
        assert "weight" in capsys.readouterr().err
    one = ["generate", "--model", str(world["base"]), *experts[:2], *rest, "--merge-weight", "0.5"]
    assert main([*one, "--output", str(tmp_path / "wrong")]) == 2
    assert not (tmp_path / "wrong").exists()
