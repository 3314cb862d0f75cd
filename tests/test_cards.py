"""Cards claim what the folder holds, their metadata is the Hub's, and their snippets run."""

import importlib.util
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import MusicgenForConditionalGeneration, pipeline, set_seed

from diverse_cfg import cards
from diverse_cfg.cards import CardMetric, Sample, render_card, write_card, write_metrics, write_samples
from diverse_cfg.provenance import Provenance, write_provenance
from tests import checkpoints as made


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made.make_merges(tmp_path_factory.mktemp("cards"))


def snippets(card):
    """Its Python code blocks."""
    return re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_snippets_run_and_play_without_guidance(world, tmp_path, monkeypatch, decoder_rows, kind):
    """Every Python block, as a reader would paste it; catches guidance that comes back (2 rows for a
    clip)."""
    monkeypatch.chdir(tmp_path)
    blocks = snippets(render_card(world[kind], repo_id=str(world[kind])))
    assert len(blocks) == 4
    for block in blocks:
        decoder_rows.clear()
        variables = {}
        if "to_audiocraft" in block and importlib.util.find_spec("audiocraft") is None:
            compile(block, "card", "exec")
            continue
        exec(block, variables)
        if "clip" in variables:
            assert (tmp_path / "clip.wav").stat().st_size > 1000
            assert set(decoder_rows) == {1}
        elif "audio" in variables:
            assert set(decoder_rows) == {len(variables["audio"])}
            assert torch.isfinite(variables["audio"]).all()
        elif "waveforms" in variables:
            assert variables["waveforms"].shape == (1, 1, 17 * 64)
            assert variables["music"].generation_params["cfg_coef"] == 1.0
        else:
            assert variables["clips"].waveforms.shape == (4, 17 * 64)


def test_the_adapter_snippet_plays_the_merged_model(world):
    """Catches a pipeline that ignores the adapter, and the double guidance that it falls into without our
    settings."""
    settings = {"do_sample": False, "guidance_scale": 1.0, "max_new_tokens": 20}
    audio = {
        name: pipeline("text-to-audio", model=str(world[name]))("sad cello", generate_kwargs=settings)[
            "audio"
        ]
        for name in ("adapter", "merged", "base")
    }
    np.testing.assert_allclose(audio["adapter"], audio["merged"], atol=1e-5)
    assert np.abs(audio["base"] - audio["merged"]).max() > 1e-2


def test_other_programs_guide_an_adapter_twice(world, tmp_path, decoder_rows):
    """Why cards and `inspect` warn: the day this fails, the warnings may go.

    The folder says 1.0 in its own generation_config.json, which no loader asks; a config.json beside it only
    makes them look for the base's weights there.
    """
    folder = made.copy(world["adapter"], tmp_path / "adapter")
    assert json.loads((folder / "generation_config.json").read_text())["guidance_scale"] == 1.0
    music = pipeline("text-to-audio", model=str(folder))
    music("sad cello")
    assert set(decoder_rows) == {2}
    direct = MusicgenForConditionalGeneration.from_pretrained(folder)
    base = MusicgenForConditionalGeneration.from_pretrained(world["base"])
    for model in (music.model, direct, PeftModel.from_pretrained(base, folder).merge_and_unload()):
        assert model.generation_config.guidance_scale == 3.0
    direct.config.save_pretrained(folder)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        MusicgenForConditionalGeneration.from_pretrained(folder)


def test_an_adapters_card_begins_with_the_guidance_that_others_take(world):
    for kind, warned in (("adapter", True), ("merged", False)):
        body = render_card(world[kind]).split("---\n", 2)[2].split("\n")
        assert ("guidance_scale=1.0" in "".join(body[:6])) == warned, body[:6]


def test_metadata(world):
    """Library, relation and tags decide where the Hub shows the model and how it offers to load it."""
    merged = metadata(render_card(world["merged"], repo_id="me/merged", tags=["nano"]))
    assert merged["library_name"] == "transformers"
    assert (merged["base_model"], merged["base_model_relation"]) == ("user/base", "merge")
    assert merged["pipeline_tag"] == "text-to-audio"
    assert {"arxiv:2410.06084", "merge", "nano"} <= set(merged["tags"])
    assert metadata(render_card(world["full1"]))["base_model_relation"] == "finetune"
    adapter = metadata(render_card(world["adapter"]))
    assert adapter["library_name"] == "peft"
    assert "base_model" not in adapter, "a folder of this machine is no base that the Hub knows"
    with_id = made.copy(world["adapter"], world["adapter"].parent / "with-id")
    made.edit_json(with_id / "adapter_config.json", base_model_name_or_path="user/base")
    assert metadata(render_card(with_id))["base_model_relation"] == "adapter"


def test_results_have_intervals_and_become_a_model_index(world, tmp_path):
    folder = made.copy(world["merged"], tmp_path / "m")
    assert "Not evaluated yet." in render_card(folder)
    metrics = [
        CardMetric("Vendi score", 2.34567, 2.1, 2.5, judge="eval-encoder", better="higher"),
        CardMetric("text adherence | CLAP", 0.31),
    ]
    write_metrics(folder, metrics, prompts="48 held-out prompts", num_clips=384)
    card = render_card(folder, repo_id="me/merged")
    assert "Not evaluated" not in card
    assert "| Vendi score (higher is better) | 2.346 | 2.1 … 2.5 | eval-encoder |" in card
    assert r"| text adherence \| CLAP | 0.31 | — | — |" in card, "a bar in a name must not open a column"
    [result, _] = ModelCard(card).data.eval_results
    assert (result.metric_name, result.metric_value) == ("Vendi score (eval-encoder)", 2.34567)
    assert (result.dataset_name, result.metric_type) == ("48 held-out prompts", "vendi-score")


def test_samples_are_played(world, tmp_path):
    folder = made.copy(world["merged"], tmp_path / "m")
    (folder / "samples").mkdir()
    (folder / "samples" / "a b.wav").write_bytes(b"RIFF")
    prompt = 'a "loud" <script>alert(1)</script> `drum`\nsong'
    write_samples(folder, [Sample("samples/a b.wav", prompt, seed=3)])
    card = render_card(folder)
    assert '<audio controls src="samples/a b.wav"></audio>' in card
    assert "<script>" not in re.sub(r"^---.*?^---|```.*?```", "", card, flags=re.DOTALL | re.MULTILINE)
    assert metadata(card)["widget"] == [{"text": prompt, "output": {"url": "samples/a b.wav"}}]
    for block in snippets(card):
        compile(block, "card", "exec")
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        write_samples(folder, [Sample("samples/missing.wav", "x")])


def test_what_is_not_known_is_not_claimed(world, tmp_path):
    """No base licence, no metrics, no teacher: the card says so; and a folder without provenance gets none
    at all."""
    card = render_card(world["merged"])
    assert "license" not in metadata(card)
    assert "Not known: the weights inherit the licence of user/base" in card
    with pytest.raises(ValueError, match=r"diverse_cfg\.json"):
        render_card(world["base"])


@pytest.mark.parametrize(
    ("base", "license"),
    [("facebook/musicgen-stereo-large", "cc-by-nc-4.0"), ("somebody/musicgen", None), (None, None)],
)
def test_the_licence_is_the_bases(base, license):
    assert cards._base_license(base) == license


def test_the_licence_is_read_from_the_bases_card(world, tmp_path):
    """A local base brings its card along; the merged weights inherit what it says."""
    base = made.copy(world["base"], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    adapter = made.copy(world["adapter"], tmp_path / "adapter")
    made.edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    card = render_card(adapter)
    assert metadata(card)["license"] == "cc0-1.0"
    assert metadata(render_card(adapter, license="mit"))["license"] == "mit"


def test_local_paths_stay_at_home(world, tmp_path):
    """A card is public: it names folders, not where they lie. Only the snippet of an unpublished adapter
    needs a path."""
    folder = made.copy(world["full1"], tmp_path / "student")
    write_provenance(
        folder,
        Provenance(
            "student",
            base_model=str(world["base"]),
            training={"initial_model": str(world["full2"]), "steps": 5},
        ),
    )
    card = render_card(folder)
    assert str(tmp_path.parent) not in card and str(world["base"].parent) not in card
    assert "| `initial_model` | full2 |" in card


def test_card_after_peft_and_twice(world, tmp_path):
    """PEFT writes a README of its own: ours replaces it, and writing it again changes nothing."""
    adapter = made.copy(world["lora1"], tmp_path / "a")
    assert "PEFT" in (adapter / "README.md").read_text()
    made.edit_json(adapter / "adapter_config.json", base_model_name_or_path="facebook/musicgen-small")
    (adapter / "generation_config.json").write_text(json.dumps({"guidance_scale": 1.0, "max_new_tokens": 20}))
    first = write_card(adapter, repo_id="me/a").read_text()
    assert "distilled from [facebook/musicgen-small]" in first
    assert "γ = 3" in first
    assert write_card(adapter, repo_id="me/a").read_text() == first
    assert sorted(p.name for p in adapter.iterdir() if p.name.startswith(".")) == []


def test_training_curves_are_drawn_from_the_trainers_log(world, tmp_path):
    folder = made.copy(world["full1"], tmp_path / "student")
    log = [{"step": i, "kl/clip": 5.0 / i, "reward/diversity": 0.1 * i, "loss": 1.0} for i in range(1, 6)]
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": [*log, {"step": 5, "train_runtime": 3.0}]})
    )
    card = write_card(folder).read_text()
    assert "![training curves](training_curves.png)" in card
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert cards.plot_training_curves(tmp_path, [{"step": 1, "loss": 2.0}]) is None, "one point is no curve"


def test_seeded_snippet_is_reproducible(world):
    """`set_seed` in the card means what a reader expects of it."""
    music = pipeline("text-to-audio", model=str(world["merged"]))
    clips = []
    for _ in range(2):
        set_seed(0)
        clips.append(music("sad cello")["audio"])
    np.testing.assert_array_equal(*clips)


@pytest.mark.parametrize("lora", [False, True])
def test_the_trainers_card_is_this_card(world, tmp_path, lora):
    """Catches TRL's template, PEFT's placeholder after it, and a card for a folder that holds no model
    yet."""
    from peft import LoraConfig

    from tests.training import tiny_trainer

    peft_config = LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
    trainer = tiny_trainer(tmp_path / "student", peft_config=peft_config)
    trainer.create_model_card()
    assert not (tmp_path / "student" / "README.md").exists(), "nothing was saved yet"
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="student", dataset_name="me/prompts", tags="mine")
    card = (tmp_path / "student" / "README.md").read_text()
    assert card == render_card(
        tmp_path / "student", repo_id="student", datasets=["me/prompts"], tags=["mine"]
    )
    assert metadata(card)["library_name"] == ("peft" if lora else "transformers")
    assert metadata(card)["datasets"] == ["me/prompts"]
    assert "β = 5" in card and "training_curves.png" in card


def test_the_example_cards_are_what_the_template_renders():
    """A change of the template shows in review as the cards that it changes: run `python
    model_cards/render.py`."""
    import importlib.util

    path = Path(__file__).parent.parent / "model_cards" / "render.py"
    spec = importlib.util.spec_from_file_location("render_cards", path)
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    examples = render.render_examples()
    assert {file: (path.parent / file).read_text() for file in examples} == examples
    for card in examples.values():
        assert metadata(card)["license"] == "cc-by-nc-4.0"
        assert metadata(card)["base_model"] == "facebook/musicgen-small"
        assert "Not evaluated yet." in card


@pytest.mark.parametrize("kind", ["adapter", "merged", "base"])
def test_our_loader_and_generator_guard_against_double_guidance(world, kind):
    """The loader switches guidance off; asking for it all the same is answered with a warning; a base may
    be guided."""
    import diverse_cfg

    model = diverse_cfg.load_policy(world[kind])
    processor = diverse_cfg.load_processor(world[kind])
    options = {"processor": processor, "num_frames": 4, "seed": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diverse_cfg.fast_generate(model, "sad cello", guidance_scale=3.0, **options)
        diverse_cfg.fast_generate(model, "sad cello", **options)
    found = [w for w in caught if "applied twice" in str(w.message)]
    assert len(found) == (0 if kind == "base" else 1)
    assert all(w.filename == __file__ for w in found), "it points at the caller"
    assert model.generation_config.guidance_scale == (3.0 if kind == "base" else 1.0)
