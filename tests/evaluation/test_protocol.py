"""The YAML of `diverse-cfg evaluate`: what is refused before anything is generated, and a run from end to
end."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import yaml

from diverse_cfg.cli import main
from diverse_cfg.embeddings.contrastive import ContrastiveConfig, ContrastiveEmbedder, ContrastiveEncoder
from diverse_cfg.evaluation import report
from diverse_cfg.evaluation.cache import Cache
from diverse_cfg.evaluation.features import EmbeddingFeature, reference_embeddings
from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep
from diverse_cfg.evaluation.results import Results
from diverse_cfg.settings import read_settings
from tests import oracles
from tests.evaluation.worlds import CodesEncoder, WaveEncoder, encoder_folder, save_sibling
from tests.faults import held
from tests.tiny import PROMPTS, save_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two models, an encoder, prompts and reference audio of two sampling rates."""
    root = tmp_path_factory.mktemp("protocol")
    save_tiny(root / "base")
    save_sibling(root / "student")
    config = ContrastiveConfig(sampling_rate=3200, bands=8, hidden_size=8, num_layers=1, num_heads=2, dim=4)
    ContrastiveEmbedder(ContrastiveEncoder(config)).save_pretrained(root / "encoder")
    (root / "test.txt").write_text("\n".join(PROMPTS) + "\n" + PROMPTS[0] + "\n")
    (root / "reference").mkdir()
    generator = np.random.default_rng(0)
    for name, rate in (("a", 3200), ("b", 6400)):
        soundfile.write(root / "reference" / f"{name}.wav", generator.normal(0, 0.1, size=5 * rate), rate)
    return root


def settings(root, output, **changes):
    values = {
        "systems": [{"name": "base", "model": str(root / "base")}],
        "output": str(output),
        "prompts": str(root / "test.txt"),
        "num_generations": 2,
        "clip_seconds": 0.24,
        "teacher": str(root / "base"),
        "judge": None,
        "reward_encoder": None,
        "heldout_encoder": str(root / "encoder"),
        "gallery_prompts": 1,
        "min_validity": 0.0,  # a random codec is nearly silent
        "device": "cpu",
    }
    return values | changes


def evaluate(values):
    return report.evaluate(SweepConfig.from_dict(values), progress=False)


ARMS = dict.fromkeys(("base", "guided", "quality", "diverse", "merges"), "base")


def test_a_sweep_from_end_to_end(root, tmp_path, capsys):
    """The command writes every file, names what failed, and returns 2 for it."""
    base, student, gone = (str(root / name) for name in ("base", "student", "nowhere"))
    systems = [
        {"name": "base", "model": base, "guidance_scale": [1.0, 3.0]},
        {"name": "LERP", "checkpoints": [base, student], "merge_weight": "0:1:0.5"},
        {"name": "gone", "checkpoints": [base, gone]},
    ]
    arms = {"base": "base γ=1", "guided": "base γ=3", "merges": "LERP"}
    arms |= {"quality": "LERP λ=0", "diverse": "LERP λ=1"}
    more = {"compare_to": ["base γ=3"], "reference": str(root / "reference"), "arms": arms}
    more |= {"x": "diversity_heldout", "y": "validity"}
    values = settings(root, tmp_path / "sweep", systems=systems, **more)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True))
    assert main(["evaluate", "--config", str(path)]) == 2
    captured = capsys.readouterr()
    assert "1 of 6 systems failed: gone" in captured.err
    assert "| base γ=3 |" in captured.out
    results = Results.load(tmp_path / "sweep")
    assert [row.ok for row in results.systems] == [True] * 5 + [False]
    assert {"frechet", "mmd", "kl_teacher", "diversity_heldout", "validity"} <= set(results.metrics)
    assert results["base γ=3"].metrics["kl_teacher"].estimate == pytest.approx(0, abs=1e-4)
    assert results.prompts == PROMPTS  # the repeated one counts once
    for name in ("metrics.json", "results.md", "front.svg", "lerp-lerp.svg", "index.html"):
        assert (tmp_path / "sweep" / name).is_file(), name
    page = (tmp_path / "sweep" / "results.md").read_text()
    assert page.count("### ") == 5 and "![" in page and "| gone | failed:" in page
    differences = json.loads((tmp_path / "sweep" / "metrics.json").read_text())["systems"][0]["differences"]
    assert differences["base γ=3"]["decoder_rows"]["estimate"] < 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["beauty"]}, "unknown metric 'beauty'"),
        ({"metrics": ["frechet"]}, "needs reference"),
        ({"metrics": ["adherence"]}, "needs judge"),
        ({"num_generations": 1, "metrics": ["diversity_heldout"]}, "num_generations >= 2"),
        ({"num_prompts": 99}, "has 4 different prompts"),
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"clip_seconds": 99.0}, "clip_seconds=99.0"),
        ({"systems": []}, "non-empty list"),
        (
            {"systems": [{"name": "h", "model": "x", "first": "y", "first_frames": 12, "role": "base"}]},
            "system 'h': first_frames=12 must be below the clip's 12 frames",
        ),
        ({"output": ""}, "output is missing"),
        ({"min_validity": 2}, "min_validity=2"),
        ({"gallery_prompts": -1}, "gallery_prompts=-1"),
        ({"guidance": 3}, "no setting guidance"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"rollout_backend": "vllm"}, "rollout_backend='vllm' must be one of fast, transformers"),
        ({"heldout_encoder": None, "reference": "x"}, "reference needs heldout_encoder"),
        ({"arms": {"base": "base"}}, "arms needs base, guided"),
        ({"x": "beauty"}, "unknown metric 'beauty'; known"),
        ({"x": "frechet"}, "x='frechet' is not measured here"),
        ({"y": "validity", "metrics": ["silence"]}, r"y='validity' is not measured here.*silence"),
        ({"x": "level", "arms": ARMS}, "x='level' is neither better"),
        ({"x": "different_prompts_heldout", "arms": ARMS}, "is a number of all prompts together"),
        ({"seeds": 0}, r"seeds=0 must be a list \(each entry an integer\)"),
        ({"seeds": [0.5]}, r"seeds=\[0.5\] must be a list"),
        ({"seeds": [True]}, r"seeds=\[True\] must be a list"),
        ({"seeds": [-1]}, "seed -1 must be an integer from 0"),
        ({"clip_seconds": "x"}, "clip_seconds='x' must be a finite number or nothing"),
        ({"min_validity": "x"}, "min_validity='x' must be a finite number"),
        (
            {"teacher": None, "teacher_guidance_scale": 2.0},
            "teacher_guidance_scale=2.0 has no effect without",
        ),
        (
            {"gallery_prompts": 0, "gallery_generations": 2},
            "gallery_generations=2 has no effect with gallery_p",
        ),
        ({"prompts_split": "train"}, "prompts_split='train' has no effect for the file"),
        ({"teacher_guidance_scale": "abc"}, "teacher_guidance_scale='abc' must be a finite number"),
        ({"gallery_prompts": "a"}, "gallery_prompts='a' must be an integer"),
        ({"metrics": 3}, "metrics=3 must be a list"),
        ({"output": 3}, "output=3 must be text"),
        ({"aesthetics": "no"}, "aesthetics='no' must be true or false"),
        ({"systems": {"name": "a"}}, r"systems=.* must be a list \(each entry settings by name\)"),
        ({"device": "foo"}, "device='foo' cannot be used"),
        ({"compare_to": "base"}, "compare_to='base' must be a list"),
        ({"compare_to": ["bas"]}, "compare_to names 'bas', which is no system here; known: base"),
        ({"arms": ARMS | {"base": "bas"}}, "arms: base names 'bas', which is no system here"),
        ({"arms": ARMS | {"uniform": "bas"}}, "arms: uniform names 'bas', which is no system here"),
        ({"arms": ARMS | {"merges": "bas"}}, "arms: merges names 'bas', which is no series here"),
        (
            {"arms": ARMS | {"sweeps": ["base", "bas"]}},
            "arms: sweeps names 'bas', which is no system or series here",
        ),
        ({"arms": ARMS | {"sweeps": [["base", "bas"]]}}, "arms: sweeps names 'bas', which is no system or"),
        ({"arms": ARMS | {"sweeps": "base"}}, "arms: sweeps='base' must be a list"),
        ({"arms": ARMS | {"quality": 5}}, "arms: quality=5 must be text"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_generated(
    root, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(
        "diverse_cfg.evaluation.generations.fast_generate", lambda *_, **__: pytest.fail("generated already")
    )
    with pytest.raises(ValueError, match=message):
        evaluate(settings(root, tmp_path / "sweep") | changes)


def test_times_name_the_machine_that_took_them(root, tmp_path, monkeypatch):
    """Catches kept times that are said to be this machine's: here a slower one sampled half of the clips."""
    values = settings(root, tmp_path / "sweep", metrics=["seconds"], gallery_prompts=0)
    monkeypatch.setattr("diverse_cfg.evaluation.generations._machine", lambda device: f"old one, {device}")
    results = evaluate(values)
    assert results.settings["timed_on"] == ["old one, cpu"]
    monkeypatch.undo()
    values["systems"] = [*values["systems"], {"name": "student", "model": str(root / "student")}]
    found = evaluate(values).settings["timed_on"]
    assert len(found) == 2 and "old one, cpu" in found and any("threads" in name for name in found)
    page = (tmp_path / "sweep" / "results.md").read_text(encoding="utf-8")
    assert "old one, cpu" in page and "Times of different machines do not compare." in page


def test_a_checkpoint_alone_is_no_path(root, tmp_path):
    """Catches a figure that fails after the sweep: one system with a step has no trajectory."""
    systems = [{"name": "base", "model": str(root / "base"), "step": 5}]
    values = settings(root, tmp_path / "sweep", systems=systems, x="diversity_heldout", y="validity")
    evaluate(values | {"gallery_prompts": 0})
    assert (tmp_path / "sweep" / "front.svg").exists()
    assert not (tmp_path / "sweep" / "trajectories.svg").exists()


def test_missing_files_are_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        build_sweep(SweepConfig.from_dict(settings(root, tmp_path, prompts="./nowhere.txt")))
    with pytest.raises(FileNotFoundError, match="holds no audio"):
        build_sweep(SweepConfig.from_dict(settings(root, tmp_path, reference=str(tmp_path / "nowhere"))))
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="settings by name"):
        read_settings(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_settings(tmp_path / "bad.yaml")


def test_a_page_that_is_not_written_is_not_announced(root, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings(root, tmp_path / "sweep", metrics=["validity"])))
    assert main(["evaluate", "--config", str(path), "--no-gallery"]) == 0
    assert f"results, figures: {tmp_path / 'sweep'}" in capsys.readouterr().out


def test_a_sweep_without_quality_or_diversity_has_no_front(root, tmp_path):
    values = settings(root, tmp_path / "sweep", metrics=["validity"], gallery_prompts=0)
    results = evaluate(values)
    assert results.metrics == ["validity"]
    assert not (tmp_path / "sweep" / "front.svg").exists()
    assert not (tmp_path / "sweep" / "index.html").exists()


def test_a_listening_test_is_made_of_the_clips_that_were_measured(root, tmp_path, capsys):
    """From the command line: other prompts in the configuration, or a retrained model, are refused."""
    model = shutil.copytree(root / "student", tmp_path / "student")
    systems = [{"name": "base", "model": str(root / "base")}, {"name": "student", "model": str(model)}]
    values = settings(root, tmp_path / "sweep", systems=systems, metrics=["validity"], gallery_prompts=0)
    (tmp_path / "other.txt").write_text("\n".join(reversed(PROMPTS)))

    def listen(folder, **changes):
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        make = ["listen", "make", str(tmp_path / folder), "--config", str(path), "--pair", "base", "student"]
        return main([*make, "--quality", "2", "--diversity", "0"]), capsys.readouterr()

    code, said = listen("early")
    assert code == 2 and "holds no results: run `diverse-cfg evaluate" in said.err
    evaluate(values)
    code, said = listen("study")
    assert code == 0 and "2 trials in" in said.out
    code, said = listen("mixed", prompts=str(tmp_path / "other.txt"))
    assert code == 2 and f"prompt 1 of the configuration is {PROMPTS[3]!r}" in said.err
    save_sibling(model, seed=2)
    code, said = listen("retrained")
    assert code == 2 and "'student' is not what the results were made from" in said.err
    assert [path.name for path in tmp_path.iterdir() if (path / "trials.json").exists()] == ["study"]


def test_when_every_system_fails_the_error_says_why(root, tmp_path):
    values = settings(
        root, tmp_path / "sweep", systems=[{"name": "x", "checkpoints": ["/nowhere/a", "/nowhere/b"]}]
    )
    with pytest.raises(ValueError, match=r"every system failed; the first: .*no folder"):
        evaluate(values)
    assert Results.load(tmp_path / "sweep")["x"].error


# ---- reference audio -----------------------------------------------------------------------------


class Levels(WaveEncoder):
    """(length in seconds, level): tells whether the sampling rate arrived."""

    def embed(self, inputs, sampling_rate=None):
        import torch

        seconds = torch.full((len(inputs), 1), inputs.shape[1] / sampling_rate)
        return torch.cat([seconds, inputs.square().mean(dim=1, keepdim=True).sqrt()], dim=1)


def test_reference_audio_of_any_rate_is_cut_into_clips(root, tmp_path):
    """Catches files read at one rate: 5 s at 3200 and at 6400 Hz are five clips of 1 s each."""
    feature = EmbeddingFeature("heldout", Levels(), encoder_folder(tmp_path / "encoder"))
    values = reference_embeddings(root / "reference", feature, 1.0, Cache(tmp_path / "cache"))
    assert values.shape == (10, 2)
    np.testing.assert_allclose(values[:, 0], 1.0)
    np.testing.assert_allclose(values[:, 1], 0.1, rtol=0.1)
    feature.embed = lambda *_: pytest.fail("embedded again")
    np.testing.assert_array_equal(
        reference_embeddings(root / "reference", feature, 1.0, Cache(tmp_path / "cache")), values
    )


def test_reference_audio_that_cannot_be_used(root, tmp_path):
    feature = EmbeddingFeature("heldout", Levels(), encoder_folder(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="gives 0 clips of 60 s"):
        reference_embeddings(root / "reference", feature, 60.0, Cache(tmp_path / "cache"))
    codes = EmbeddingFeature("heldout", CodesEncoder(), encoder_folder(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="reads codes"):
        reference_embeddings(root / "reference", codes, 1.0, Cache(tmp_path / "cache"))
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "text.wav").write_text("no audio")
    with pytest.raises(ValueError, match=r"text.wav cannot be read"):
        reference_embeddings(tmp_path / "audio", feature, 1.0, Cache(tmp_path / "cache"))


def test_distances_to_reference_in_a_sweep_are_scipys(root, tmp_path):
    """The whole way from WAV files to the number in the table, against SciPy on the same embeddings."""
    values = settings(root, tmp_path / "sweep", reference=str(root / "reference"), metrics=["frechet"])
    sweep, systems = build_sweep(SweepConfig.from_dict(values))
    row = sweep.evaluate(systems[0])
    replicate = sweep._replicate(systems[0], systems[0].replicates[0], None)
    clips = replicate.groups("heldout").flatten(0, 2).double().numpy()
    expected = oracles.frechet_distance(clips, sweep.reference.astype(float))
    assert row.metrics["frechet"].estimate == pytest.approx(expected, rel=1e-4)


def test_two_sweeps_cannot_write_into_one_folder(root, tmp_path):
    with held(tmp_path), pytest.raises(FileExistsError, match="another process is writing to"):
        evaluate(settings(root, tmp_path))
    assert list(tmp_path.iterdir()) == []
