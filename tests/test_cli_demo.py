"""The demo on a tiny world: everything happens, a second run does nothing, and an interrupted one goes on."""

import copy
import json

import numpy as np
import pytest
import torch

from diverse_cfg.cli import demo
from diverse_cfg.embeddings.contrastive import ContrastiveConfig, ContrastiveEmbedder, ContrastiveEncoder
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Results
from diverse_cfg.merging import read_recipe
from diverse_cfg.nano.judge import AttributeJudge
from diverse_cfg.provenance import read_provenance
from diverse_cfg.trainer import CFGDiversityTrainer
from tests.faults import held
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow

WORDS = [
    f"{tempo} {instrument} song in {key} minor"
    for tempo in ("slow", "fast")
    for instrument in ("piano", "flute")
    for key in ("c", "d", "e")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The shipped recipes on a base, two encoders and a judge of a few thousand random weights, and a dozen prompts."""
    root = tmp_path_factory.mktemp("world")
    save_tiny(root / "base")
    torch.manual_seed(0)
    for name, reads in (("reward", "codes"), ("heldout", "waveforms")):
        config = ContrastiveConfig(
            reads=reads,
            sampling_rate=3200,
            codebook_size=16,
            bands=8,
            patch=1,
            hidden_size=8,
            num_layers=1,
            num_heads=2,
            dim=4,
        )
        ContrastiveEmbedder(ContrastiveEncoder(config)).save_pretrained(root / name)
    AttributeJudge().save_pretrained(root / "judge")
    (root / "prompts").mkdir()
    for split, prompts in (("train", WORDS[:8]), ("test", WORDS)):
        lines = "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts)
        (root / "prompts" / f"{split}.jsonl").write_text(lines)
    parts = {part: str(root / part) for part in ("base", "prompts", "reward", "heldout", "judge")}
    recipes = demo.shipped_recipes(quick=True)
    small = {"num_generations": 3, "per_device_train_batch_size": 6, "warmup_steps": 1, "logging_steps": 1}
    small |= {"dataset_name": parts["prompts"], "diversity_embedder": parts["reward"], "save_steps": 2}
    recipes["quality"] |= small | {"model_name_or_path": parts["base"], "max_steps": 4}
    recipes["diversity"] |= small | {"teacher_model": parts["base"], "max_steps": 2}
    for system in recipes["evaluate"]["systems"][:2]:
        system["model"] = parts["base"]
    names = {"teacher": "base", "reward_encoder": "reward", "heldout_encoder": "heldout"}
    recipes["evaluate"] |= {setting: parts[part] for setting, part in names.items()}
    recipes["evaluate"] |= {"prompts": parts["prompts"], "judge": parts["judge"], "num_prompts": 4}
    recipes["evaluate"] |= {"num_generations": 2, "gallery_generations": 1}
    recipes["evaluate"]["x"] = "diversity_heldout"  # nothing that such models play is clean
    return recipes


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One complete demo, and what it said."""
    output, said = tmp_path_factory.mktemp("runs") / "demo", []
    results = demo.demo(output, world, tell=said.append)
    return output, results, said


def test_everything_that_was_promised_is_there(finished):
    output, results, said = finished
    for name in ("metrics.json", "metrics.csv", "front.svg", "front.png", "front.csv", "index.html"):
        assert (output / name).stat().st_size > 100, name
    assert list(output.glob("lerp-*.svg")) and (output / "training-curves.svg").is_file()
    assert [row.system.name for row in results.systems] == [
        "base",
        "base γ=3",
        "quality student",
        "merge λ=0.5",
        "diversity student",
    ]
    assert all(row.ok for row in results.systems), [row.error for row in results.systems]
    assert len(list((output / "audio").rglob("*.wav"))) == 5 * 2
    page = (output / "index.html").read_text(encoding="utf-8")
    for picture in ("front.svg", "training-curves.svg"):
        assert f'src="{picture}"' in page
    text = "\n".join(said)
    assert said[0].startswith("Plan:") and "min on two idle cores" in said[0]
    assert said[-1].endswith(f"diverse-cfg play {output}")
    assert "| diversity student" in text and str(output.resolve() / "index.html") in text
    assert "quality student − base γ=3, prompt adherence:" in text


def test_the_students_are_what_the_method_says(finished, world):
    """Catches a second student whose teacher is the first: θ0 is the base for both."""
    output, _, _ = finished
    quality, diversity = read_provenance(output / "quality"), read_provenance(output / "diversity")
    assert (quality.diversity_coef, diversity.diversity_coef) == (0.0, 40.0)
    assert quality.base_model == diversity.base_model == world["quality"]["model_name_or_path"]
    assert quality.training["initial_model"] == world["quality"]["model_name_or_path"]
    assert diversity.training["initial_model"] == str(output / "quality")
    assert (quality.training["steps"], diversity.training["steps"]) == (4, 2)
    experts = read_recipe(output / "merges" / "weight-0.5")["experts"]
    assert [expert["weight"] for expert in experts] == [0.5, 0.5]


def test_the_cards_have_the_numbers(finished):
    output, results, _ = finished
    content = json.loads((output / "diversity" / "evaluation.json").read_text())
    by_name = {metric["name"]: metric for metric in content["metrics"]}
    expected, shown = results["diversity student"].metrics["adherence"], by_name[METRICS["adherence"].axis]
    assert shown["value"] == expected.estimate and shown["judge"] == "attribute judge"
    assert content["num_clips"] == 8
    card = (output / "diversity" / "README.md").read_text()
    assert "decoder rows" in card and f"{expected.estimate:.4g}" in card


def test_students_cost_half(finished):
    _, results, _ = finished
    rows = {row.system.name: row.metrics["decoder_rows"].estimate for row in results.systems}
    assert rows["base γ=3"] == 2 * rows["quality student"] == 2 * rows["merge λ=0.5"]


def test_checkpoints_do_not_stay(finished):
    output, _, _ = finished
    assert not list(output.rglob("checkpoint-*"))
    assert (output / "quality" / "trainer_state.json").is_file()


def test_a_second_run_trains_and_generates_nothing(finished, world, monkeypatch):
    output, results, _ = finished
    monkeypatch.setattr("diverse_cfg.cli.train.train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(
        "diverse_cfg.evaluation.generations.fast_generate", lambda *_, **__: pytest.fail("generated again")
    )
    again = demo.demo(output, world)
    assert again.to_dict() == results.to_dict()
    assert Results.load(output).to_dict() == results.to_dict()


def test_an_interrupted_demo_goes_on_and_ends_the_same(finished, world, tmp_path, monkeypatch):
    """Catches a run that starts over, or that continues from other weights: the results must be equal."""
    _, results, _ = finished
    save = CFGDiversityTrainer._save_checkpoint
    saved = []

    def interrupted(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(self.state.global_step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CFGDiversityTrainer, "_save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.demo(tmp_path / "demo", world)
    assert saved == [2]
    assert not (tmp_path / "demo" / "quality" / "model.safetensors").exists()
    # A checkpoint that was being written when the power failed is no checkpoint.
    (tmp_path / "demo" / "quality" / "checkpoint-3").mkdir()
    resumed = demo.demo(tmp_path / "demo", world)
    for row in results.systems:
        for metric, cells in row.cells.items():
            if metric != "seconds":
                np.testing.assert_allclose(
                    resumed[row.system.name].cells[metric], cells, rtol=1e-5, err_msg=metric
                )


def test_a_folder_of_another_demo_is_refused(finished, world, tmp_path):
    output, _, _ = finished
    with pytest.raises(FileExistsError, match="begun with other settings"):
        other = copy.deepcopy(world)
        other["quality"]["seed"] = 1
        demo.demo(output, other)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and no demo"):
        demo.demo(tmp_path / "home", world)
    with pytest.raises(FileExistsError, match="is a file"):
        demo.demo(tmp_path / "home" / "letter.txt", world)


def test_two_at_once_are_one_too_many(finished, world):
    output, _, _ = finished
    with held(output), pytest.raises(FileExistsError, match="another process is writing to"):
        demo.demo(output, world)


def test_held_out_prompts_are_spread_over_the_split(finished):
    output, _, _ = finished
    assert (output / "held-out-prompts.txt").read_text().splitlines() == WORDS[::3]
