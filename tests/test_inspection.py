"""`inspect` says what a checkpoint is, and proves whether its training changed anything."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diverse_cfg.cli import main
from diverse_cfg.merging import format_report, inspect_checkpoint, merge_checkpoints
from tests import checkpoints as made

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made.make_world(tmp_path_factory.mktemp("inspection"))


def test_an_adapter_is_measured_against_its_base(world):
    """Distances against NumPy; catches a norm of the factors instead of their product, or a wrong
    denominator."""
    report = inspect_checkpoint(world["lora2"])
    base = made.numpy_weights(world["base"])
    products = made.numpy_products(world["lora2"], made.lora2_scaling)

    def norm(tensors):
        return sum(np.sum(t**2) for t in tensors) ** 0.5

    assert report["difference"]["relative"] == pytest.approx(
        norm(products.values()) / norm(base.values()), rel=1e-5
    )
    own = {name: base[name] for name in base if ".self_attn." in name}
    part = report["difference"]["parts"]["self-attention"]
    assert part["relative"] == pytest.approx(
        norm([products[n] for n in own if n in products]) / norm(own.values()), rel=1e-5
    )
    assert report["difference"]["parts"]["codec"] == {"relative": 0.0, "changed_tensors": 0, "tensors": 84}
    assert report["difference"]["changed_tensors"] == len(products)
    assert (report["kind"], report["format"], report["lora_rank"]) == ("student", "adapter", 4)
    assert report["active"] is True


def test_an_adapter_without_effect_is_exposed(world, tmp_path):
    """B = 0, as before the first step: every file is there and nothing will be heard."""
    idle = made.copy(world["lora1"], tmp_path / "idle")
    weights = load_file(idle / ADAPTER)
    save_file({n: t * 0 if "_B" in n else t for n, t in weights.items()}, idle / ADAPTER)
    report = inspect_checkpoint(idle)
    assert report["active"] is False
    assert "IDENTICAL TO THE BASE" in format_report(report)
    assert "IDENTICAL" not in format_report(inspect_checkpoint(world["lora1"]))


def test_broken_values_are_said(world, tmp_path):
    """Fault: a part with NaN counted as unchanged, and the model as one that differs like any other."""
    broken = made.copy(world["full1"], tmp_path / "broken")
    weights = load_file(broken / made.MODEL)
    next(t for n, t in weights.items() if n.startswith("audio_encoder.decoder")).view(-1)[0] = float("nan")
    save_file(weights, broken / made.MODEL)
    report = inspect_checkpoint(broken, base=world["base"])
    assert report["difference"]["parts"]["codec"]["changed_tensors"] == 1
    assert "BROKEN: it or its base has NaN" in format_report(report)


def test_a_merge_names_its_parents(world, tmp_path):
    merged = merge_checkpoints([world["lora1"], world["full2"]], 0.3, tmp_path / "m")
    report = inspect_checkpoint(merged, base=world["base"])
    assert report["kind"] == "merge"
    assert [(p["name"], p["weight"]) for p in report["parents"]] == [("lora1", 0.7), ("full2", 0.3)]
    assert report["generation_guidance_scale"] == 1.0
    text = format_report(report)
    for piece in ("lora1 × 0.7", "full2 × 0.3", "1 (no guidance)", "user/base", "3200 Hz"):
        assert piece in text


def test_a_base_and_a_student_that_is_guided_twice(world):
    """The released checkpoints ask for guidance rightly; a distilled folder that still does is a fault to
    shout."""
    base = inspect_checkpoint(world["base"])
    assert (base["kind"], base["generation_guidance_scale"]) == ("base", 3.0)
    assert "GUIDED TWICE" not in format_report(base)
    assert "GUIDED TWICE" in format_report(
        inspect_checkpoint(world["full1"])
    )  # copied with the base's settings
    # What transformers and PEFT do with it.
    assert "OTHER PROGRAMS GUIDE TWICE" in format_report(inspect_checkpoint(world["lora1"]))


def test_without_its_base_a_student_is_still_described(world):
    """The base is on the Hub and nothing is cached: the report says that it could not compare, and why."""
    report = inspect_checkpoint(world["full1"])
    assert report["difference"] is None
    assert "user/base" in report["difference_note"]
    compared = inspect_checkpoint(world["full1"], base=world["base"])
    assert compared["active"] and compared["difference"]["parts"]["codec"]["changed_tensors"] == 0


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        inspect_checkpoint(tmp_path)


def test_buffers_are_no_parameters(tiny_folder, tiny_model):
    """Fault: the codec's running statistics counted as weights."""
    wanted = sum(parameter.numel() for parameter in tiny_model.parameters())
    assert inspect_checkpoint(tiny_folder)["num_parameters"] == wanted


def test_a_file_whose_second_half_is_zeros_is_damaged(world, tmp_path):
    """Fault: a broken copy has every byte that its header promises, and passes. The base's own zeros are none."""
    for name, weights in (("full1", made.MODEL), ("lora1", ADAPTER)):
        folder = made.copy(world[name], tmp_path / name)
        content = (folder / weights).read_bytes()
        half = (len(content) + len(content) % 8) // 2
        (folder / weights).write_bytes(content[:half] + bytes(len(content) - half))
        report = inspect_checkpoint(folder)
        assert report["all_zero"] and not any("audio_encoder" in name for name in report["all_zero"])
        assert "nothing but zeros in " in format_report(report)
        assert inspect_checkpoint(world[name])["all_zero"] == []
    assert inspect_checkpoint(tmp_path / "full1", base=tmp_path / "full1")["all_zero"] == []


def test_weights_that_are_not_finite_are_named(world, tmp_path, capsys):
    """Fault: JSON with a bare NaN, and a student of NaN that is called identical to its base."""
    folder = made.copy(world["full1"], tmp_path / "broken")
    weights, name = load_file(world["base"] / made.MODEL), "decoder.lm_heads.1.weight"
    save_file(weights | {name: weights[name] * torch.nan}, folder / made.MODEL, metadata={"format": "pt"})
    report = inspect_checkpoint(folder, base=world["base"])
    assert report["not_finite"] == [name] and report["active"]
    assert f"NaN or infinite values in {name}" in format_report(report)
    assert main(["inspect", str(folder), "--base", str(world["base"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["difference"]["relative"] is None
