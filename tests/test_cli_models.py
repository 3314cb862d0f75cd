"""`diverse-cfg merge` and `inspect` on tiny checkpoints: flags arrive, faults become one line."""

import json

import pytest
from safetensors.torch import load_file

from diverse_cfg.cli import main
from diverse_cfg.policies.loading import load_policy
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two checkpoints of one architecture (and one codec) that differ in their decoder."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = save_tiny(folder / "first"), save_tiny(folder / "second")
    from safetensors.torch import save_file

    weights = load_file(f"{second}/model.safetensors")
    weights = {name: w + 1 if name.startswith("decoder.lm_heads") else w for name, w in weights.items()}
    save_file(weights, f"{second}/model.safetensors", metadata={"format": "pt"})
    return first, second


def heads(folder):
    weights = load_file(f"{folder}/model.safetensors")
    return next(w for name, w in sorted(weights.items()) if name.startswith("decoder.lm_heads"))


def test_merge_weight_is_the_weight_of_the_second(pair, tmp_path, capsys):
    """Catches λ handed to the wrong parent."""
    first, second = pair
    assert main(["merge", first, second, "--merge-weight", "0.25", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    expected = 0.75 * heads(first) + 0.25 * heads(second)
    assert (heads(tmp_path / "out") - expected).abs().max() < 1e-6


def test_weights_dtype_and_extrapolation_arrive(pair, tmp_path, refused):
    first, second = pair
    out = tmp_path / "out"
    arguments = ["merge", first, second, "--weights", "-0.5", "1.5", "--output", str(out)]
    assert "--extrapolate" in refused(*arguments) and not out.exists()
    assert main([*arguments, "--extrapolate", "--dtype", "bfloat16"]) == 0
    merged = heads(out)
    assert str(merged.dtype) == "torch.bfloat16"
    assert (merged.float() - (1.5 * heads(second) - 0.5 * heads(first))).abs().max() < 0.05


def test_a_sweep_writes_one_folder_per_weight_and_goes_on(pair, tmp_path, capsys):
    arguments = ["merge", *pair, "--sweep", "0:1:0.5", "--output", str(tmp_path / "sweep")]
    for _ in range(2):  # the second run finds all of it done
        assert main(arguments) == 0
        folders = capsys.readouterr().out.split()
        assert [folder.rsplit("/", 1)[1] for folder in folders] == ["weight-0", "weight-0.5", "weight-1"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--merge-weight", "1.5"], "pass extrapolate=True (--extrapolate)"),
        (["--weights", "0.5"], "got 1 merge weights for 2 checkpoints"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--sweep", "0:1"], "a sweep is written start:stop:step"),
        (["--sweep", "0:1:0.5", "--unnormalized"], "leave it out"),
        (["--weight", "0.5", "--unnormalized"], "--unnormalized has no effect without --weights"),
        (["--uniform", "--extrapolate"], "--extrapolate has no effect on the plain average"),
        (["--weight", "nan"], "merge weights must be finite"),
    ],
)
def test_wrong_merges_are_one_line(pair, tmp_path, refused, extra, message):
    assert message in refused("merge", *pair, "--output", tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("merge_weight: '0.5'", "merge_weight='0.5' must be a finite number"),
        ("merge_weight: .nan", "merge_weight=nan must be a finite number"),
        ("checkpoints: abc", "checkpoints='abc' must be a list (each entry text)"),
        ("weights: [0.5, true]", "weights=[0.5, True] must be a list"),
        ("format: halves", "format='halves' must be 'full' or 'adapter'"),
        ("extrapolate: 1", "extrapolate=1 must be true or false"),
        (
            "merge_weight: 0.2\nsweep: 0:1:0.5",
            "names several ways to weigh: merge_weight and sweep; keep one",
        ),
        ("merge_weight: 0.2\nmerge_weight: 0.3", "merge_weight is set twice"),
        ("base: null", "base=None must be text"),
    ],
)
def test_a_wrong_recipe_is_one_line(pair, tmp_path, refused, recipe, message):
    """Fault: a TypeError, or one of two ways that is dropped in silence."""
    (tmp_path / "merge.yaml").write_text(recipe)
    assert message in refused("merge", *pair, "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_typed_wins_over_the_recipe(pair, tmp_path):
    """Fault: a typed 0 taken for nothing typed, and `--format full` overruled by the recipe."""
    (tmp_path / "merge.yaml").write_text("merge_weight: 0.5\nformat: adapter\n")
    arguments = ["merge", *pair, "--config", str(tmp_path / "merge.yaml"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--weight", "0", "--format", "full"]) == 0
    assert (heads(tmp_path / "out") == heads(pair[0])).all()


def test_nothing_is_overwritten(pair, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert "exists already" in refused("merge", *pair, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_inspect_reports_the_difference_from_a_base(pair, capsys):
    first, second = pair
    assert main(["inspect", second, "--base", first]) == 0
    text = capsys.readouterr().out
    assert "heads" in text
    assert main(["inspect", second, "--base", first, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["active"] is True
    assert report["difference"]["parts"]["heads"]["changed_tensors"] == 4
    assert report["difference"]["parts"]["codec"]["changed_tensors"] == 0


def test_inspect_of_nothing_is_one_line(tmp_path, refused):
    assert "nowhere" in refused("inspect", tmp_path / "nowhere")


def test_an_empty_name_is_one_line(capsys):
    """Fault: a variable of a shell that is not set stands for this folder, or for an odd Hub id."""
    assert main(["inspect", ""]) == 2
    assert "error: the name of a model is empty: name a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the name of a model is empty"):
        load_policy("")
