"""`diverse-cfg convert`, and the other commands on an AudioCraft folder as they would on any model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diverse_cfg.cli import main
from diverse_cfg.functional.guidance import GuidanceRange
from diverse_cfg.policies.loading import is_distilled, load_policy
from diverse_cfg.policies.shift import GuidanceShift, read_shift
from diverse_cfg.provenance import Provenance, write_provenance

DATA = Path(__file__).parent / "policies" / "data" / "audiocraft" / "mono"
FILES = {"state_dict.bin", "compression_state_dict.bin"}


def tensors(folder):
    return {name: torch.load(folder / name, weights_only=True)["best_state"] for name in FILES}


@pytest.fixture
def student(tmp_path):
    """A distilled checkpoint in AudioCraft's format: as the frozen one, with other heads."""
    converted = tmp_path / "student-transformers"
    assert main(["convert", str(DATA), "--to", "transformers", "--output", str(converted)]) == 0
    weights = load_file(converted / "model.safetensors")
    weights = {key: tensor + 1 if "lm_heads" in key else tensor for key, tensor in weights.items()}
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    sampling = {"temperature": 1.0, "top_k": 0, "num_frames": 9}
    write_provenance(
        converted, Provenance("student", base_model=str(DATA), guidance_scale=3.0, sampling=sampling)
    )
    generation = json.loads((converted / "generation_config.json").read_text())
    generation |= {"guidance_scale": 1.0, "max_new_tokens": 12, "top_k": 0}
    (converted / "generation_config.json").write_text(json.dumps(generation))
    (converted / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nmine\n")
    folder = tmp_path / "student"
    assert main(["convert", str(converted), "--to", "audiocraft", "--output", str(folder)]) == 0
    return folder


def test_there_and_back(tmp_path, capsys):
    """Both directions, every tensor bit-equal, and plain transformers' files in between."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(DATA), "--to", "transformers", "--output", str(there)]) == 0
    assert capsys.readouterr().out.strip() == str(there)
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert expected <= {path.name for path in there.iterdir()}
    assert main(["convert", str(there), "--to", "audiocraft", "--output", str(back)]) == 0
    assert {path.name for path in back.iterdir()} >= FILES
    before, after = tensors(DATA), tensors(back)
    for name in FILES:
        assert before[name].keys() == after[name].keys()
        assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], (
        "nothing half-written stays"
    )


def test_weights_that_are_not_finite_are_not_converted(tmp_path, refused):
    """Both ways; the message names the checkpoint and the weight, and nothing is written."""
    there, broken = tmp_path / "there", tmp_path / "broken"
    assert main(["convert", str(DATA), "--to", "transformers", "--output", str(there)]) == 0
    shutil.copytree(DATA, broken)
    package = torch.load(broken / "state_dict.bin", weights_only=True)
    package["best_state"]["linears.0.weight"][0, 0] = torch.nan
    torch.save(package, broken / "state_dict.bin")
    weights = load_file(there / "model.safetensors")
    weights["decoder.lm_heads.0.weight"][0, 0] = torch.inf
    save_file(weights, there / "model.safetensors", metadata={"format": "pt"})
    for folder, to in ((there, "audiocraft"), (broken, "transformers")):
        said = refused("convert", folder, "--to", to, "--output", tmp_path / "out")
        assert f"{folder} has NaN or infinite values in decoder.lm_heads.0.weight" in said
        assert not (tmp_path / "out").exists()


def test_what_a_checkpoint_is_survives_both_ways(student, tmp_path):
    """A student that forgot that it is one would be guided a second time; a licence must not get lost."""
    assert is_distilled(student)
    policy = load_policy(student)
    assert (policy.generation_config.guidance_scale, policy.generation_config.max_new_tokens) == (1.0, 12)
    assert (policy.generation_config.top_k, policy.is_distilled) == (0, True)
    assert "inference_coef: 1.0" in torch.load(student / "state_dict.bin", weights_only=True)["xp.cfg"]
    assert "cc-by-nc-4.0" in (student / "README.md").read_text()
    again = tmp_path / "again"
    assert main(["convert", str(student), "--to", "transformers", "--output", str(again)]) == 0
    for name in ("diverse_cfg.json", "README.md"):
        assert (again / name).read_text() == (student / name).read_text()


def test_half_precision_and_the_text_encoder_elsewhere(tmp_path):
    half, moved = tmp_path / "half", Path(shutil.copytree(DATA, tmp_path / "moved"))
    (moved / "text_encoder").rename(tmp_path / "t5")
    arguments = ["convert", str(moved), "--to", "transformers", "--output", str(tmp_path / "there")]
    assert main(arguments) == 2
    assert main([*arguments, "--text-encoder", str(tmp_path / "t5")]) == 0
    arguments = ["convert", str(tmp_path / "there"), "--to", "audiocraft", "--output", str(half)]
    assert main([*arguments, "--dtype", "float16"]) == 0
    states = tensors(half)
    assert {tensor.dtype for tensor in states["state_dict.bin"].values()} == {torch.float16}
    assert states["compression_state_dict.bin"]["decoder.model.0.conv.conv.weight_g"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(DATA), "--to", "audiocraft"], "in the format of audiocraft already"),
        (["{tiny}", "--to", "transformers"], "in the format of transformers already; `diverse-cfg merge`"),
        ([str(DATA), "--to", "transformers", "--dtype", "float16"], "--dtype goes with --to audiocraft"),
        (["/nowhere/at/all", "--to", "audiocraft"], "no folder /nowhere/at/all"),
        ([str(DATA.parent), "--to", "transformers"], "format of transformers already"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tiny_folder, tmp_path, refused, arguments, message):
    arguments = [argument.format(tiny=tiny_folder) for argument in arguments]
    assert message in refused("convert", *arguments, "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "dtype"), [("nan", "float32"), ("1e6", "float16")])
def test_values_that_are_lost_are_not_written(tiny_folder, tmp_path, capsys, value, dtype):
    """Fault: a checkpoint of NaN, or of the infinities that float16 makes, which looked finished."""
    source = shutil.copytree(tiny_folder, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["decoder.lm_heads.0.weight"][0, 0] = float(value)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "out"
    assert (
        main(["convert", str(source), "--to", "audiocraft", "--dtype", dtype, "--output", str(output)]) == 2
    )
    assert "NaN or infinite values in " in capsys.readouterr().err
    assert not output.exists()


def test_nothing_is_overwritten(tmp_path, refused):
    (tmp_path / "out").mkdir()
    assert "exists already" in refused("convert", DATA, "--to", "transformers", "--output", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_inspect_merge_and_generate(student, tmp_path, capsys):
    assert main(["inspect", str(student), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["active"], report["base_model"]) == ("student", True, str(DATA))
    assert set(report["difference"]["parts"]) >= {"heads"}
    assert report["difference"]["parts"]["norms"]["relative"] == 0
    merged = tmp_path / "merged"
    assert main(["merge", str(DATA), str(student), "--merge-weight", "0.25", "--output", str(merged)]) == 0
    head, base = "decoder.lm_heads.0.weight", tensors(DATA)["state_dict.bin"]["linears.0.weight"]
    torch.testing.assert_close(load_file(merged / "model.safetensors")[head], base + 0.25)
    for model in (DATA, student, merged):
        arguments = ["generate", "--model", str(model), "--prompt", "sad cello", "--seconds", "0.2"]
        assert main([*arguments, "--output", str(tmp_path / f"clips-{model.name}")]) == 0
        manifest = json.loads((tmp_path / f"clips-{model.name}" / "generations.json").read_text())
        # The base plays guided and with AudioCraft's top-k, the student without either.
        settings = manifest["settings"]
        expected = (3.0, 250) if model == DATA else (1.0, 0)
        assert (settings["guidance_scale"], settings["top_k"]) == expected or model == merged


def test_publish_sends_the_conversion(student, capsys):
    arguments = ["publish", str(student), "me/student", "--base-model", "facebook/musicgen-small"]
    assert main([*arguments, "--license", "cc-by-nc-4.0"]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out and "Nothing was sent" in out
    assert "state_dict.bin" not in out
    assert not (student / "samples").exists()


def test_evaluation_knows_the_checkpoint_by_its_content(tmp_path):
    """Its cache of clips must notice other weights in the same place."""
    from diverse_cfg.evaluation.cache import content_digest

    folder = Path(shutil.copytree(DATA, tmp_path / "m"))
    first = content_digest(folder)
    assert first == content_digest(DATA)
    package = torch.load(folder / "state_dict.bin", weights_only=True)
    package["best_state"]["linears.0.weight"].add_(1)
    torch.save(package, folder / "state_dict.bin")
    assert content_digest(folder) != first


def test_a_table_of_guidance_travels(student, tmp_path):
    """Fault: `diverse_cfg.json` tells of a range in a folder that has lost its table."""
    width = load_policy(student).config.decoder.hidden_size
    guidance = GuidanceRange.of({"low": 1, "high": 5})
    GuidanceShift.of(guidance, torch.randn(5, width)).save(student)
    content = json.loads((student / "diverse_cfg.json").read_text()) | {"guidance_range": [1, 5]}
    (student / "diverse_cfg.json").write_text(json.dumps(content))
    for source, kind in ((student, "transformers"), (tmp_path / "transformers", "audiocraft")):
        assert main(["convert", str(source), "--to", kind, "--output", str(tmp_path / kind)]) == 0
        found = load_policy(tmp_path / kind).guidance_shift
        assert found.guidance == guidance
        assert torch.equal(found.table, read_shift(student).table)
