"""What would be published: which files and which card, checked without a network."""

import json

import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file

from diverse_cfg import publishing
from diverse_cfg.assets import nano_path
from diverse_cfg.cards import Sample, write_samples
from diverse_cfg.merging import merge_checkpoints
from diverse_cfg.provenance import Provenance, write_provenance
from diverse_cfg.publishing import plan as planning
from diverse_cfg.publishing import plan_upload, publish
from tests import checkpoints as made
from tests.fake_hub import TOKEN

LICENSE = {"license": made.LICENSE}


def test_plan_names_every_file_and_leaves_the_rest(world, tmp_path):
    """Catches optimiser states, pickles, checkpoints and logs that travel along, and a size that is not the
    file's."""
    folder = made.copy(world["merged"], tmp_path / "m")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "notes.txt", ".env"):
        (folder / name).write_text("x")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_text("x")
    (folder / "samples").mkdir()
    (folder / "samples" / "a.wav").write_bytes(b"RIFF")
    write_samples(folder, [Sample("samples/a.wav", "sad cello")])
    plan = plan_upload(folder, "me/m", **LICENSE)
    names = {file.path_in_repo for file in plan.files}
    model = [
        "config.json",
        "diverse_cfg.json",
        "generation_config.json",
        "merge.yaml",
        "model.safetensors",
        "README.md",
    ]
    reading = ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert names == {*model, *reading, "samples/a.wav", "samples/samples.json"}
    assert set(plan.left_out) >= {"optimizer.pt", "training_args.bin", "checkpoint-5", ".env"}
    weights = next(file for file in plan.files if file.path_in_repo == "model.safetensors")
    assert weights.size == (folder / "model.safetensors").stat().st_size
    text = plan.describe()
    for piece in (
        "me/m (private)",
        "model.safetensors",
        "not uploaded: ",
        "optimizer.pt",
        "# m",
        "cc-by-nc-4.0",
    ):
        assert piece in text


@pytest.mark.parametrize("name", ["samples/key.txt", "model.safetensors", "merge.yaml"])
@pytest.mark.parametrize("merged", [False, True])
def test_what_lies_elsewhere_is_not_published(world, tmp_path, name, merged):
    """Fault: a link among the samples that carries a private file along, also into the full model of an adapter."""
    folder = made.copy(world["lora1" if merged else "merged"], tmp_path / "m")
    (tmp_path / "private").write_text("secret")
    (folder / "samples").mkdir()
    (folder / "samples" / ".env").write_text("secret")
    (folder / "samples" / "b.txt").symlink_to("a.txt")
    (folder / "samples" / "a.txt").write_text("x")
    found = {
        file.path_in_repo for file in publish(folder, "me/m", merged=merged, check=False, **LICENSE).files
    }
    assert {"samples/a.txt", "samples/b.txt"} <= found and "samples/.env" not in found
    if merged and not name.startswith("samples"):
        return  # made anew
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*/private, outside of the folder"):
        publish(folder, "me/m", merged=merged, check=False, **LICENSE)


@pytest.mark.parametrize(
    ("factor", "fault"), [(torch.nan, "NaN or infinite values"), (0, "nothing but zeros")]
)
def test_damaged_weights_are_not_published(world, tmp_path, factor, fault):
    """Fault: a broken copy that passes, or weights of NaN for which generation_config.json is blamed."""
    folder, name = made.copy(world["merged"], tmp_path / "m"), "decoder.lm_heads.1.weight"
    weights = load_file(folder / made.MODEL)
    save_file(weights | {name: weights[name] * factor}, folder / made.MODEL, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"m has {fault} in {name}, so it is not published"):
        publish(folder, "me/m", **LICENSE)


def test_dry_run_is_the_default_and_sends_nothing(world, hub):
    """Neither a network nor a token is needed, and `private` is what happens when nothing is said."""
    plan = publish(world["merged"], "me/merged", endpoint=hub.url, **LICENSE)
    assert isinstance(plan, publishing.UploadPlan)
    assert plan.private
    assert hub.requests == []


def test_the_published_adapter_names_the_bases_hub_id(world):
    """Catches a local path in the files that PEFT resolves: nobody else could load it."""
    with pytest.raises(ValueError, match="--base-model"):
        plan_upload(world["adapter"], "me/a", **LICENSE)
    plan = plan_upload(world["adapter"], "me/a", base_model="facebook/musicgen-small")
    files = {file.path_in_repo: file for file in plan.files}
    assert (
        json.loads(files["adapter_config.json"].source)["base_model_name_or_path"]
        == "facebook/musicgen-small"
    )
    metadata = yaml.safe_load(plan.card.split("---\n")[1])
    assert (metadata["base_model"], metadata["license"]) == ("facebook/musicgen-small", "cc-by-nc-4.0")
    assert str(world["base"]) in (world["adapter"] / "adapter_config.json").read_text(), (
        "the folder itself is untouched"
    )


def test_an_adapter_is_published_as_the_model_that_it_makes(world, hub):
    done = publish(
        world["lora1"], "me/full", merged=True, dry_run=False, token=TOKEN, endpoint=hub.url, **LICENSE
    )
    assert done.num_uploaded
    assert "model.safetensors" in hub.repos["me/full"].files
    assert "adapter_config.json" not in hub.repos["me/full"].files
    with pytest.raises(ValueError, match="full model already"):
        publish(world["merged"], "me/full", merged=True)


def test_no_path_of_this_machine_is_published(world, tmp_path):
    folder = made.copy(world["merged"], tmp_path / "m")
    write_provenance(
        folder,
        Provenance("student", base_model=str(world["base"]), training={"initial_model": str(world["full1"])}),
    )
    for file in plan_upload(folder, "me/m", **LICENSE).files:
        if not file.path_in_repo.endswith(".safetensors"):
            assert str(tmp_path.parent).encode() not in file.content, file.path_in_repo
            assert str(world["base"].parent).encode() not in file.content, file.path_in_repo


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: made.edit_json(f / "generation_config.json", guidance_scale=3.0), "set it to 1.0"),
        (lambda f: (f / "generation_config.json").unlink(), "no generation_config"),
        (lambda f: (f / "diverse_cfg.json").unlink(), "no diverse_cfg.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: (f / "merge.yaml").write_text(f"token: {TOKEN}"), "looks like a Hub token"),
    ],
)
def test_what_is_not_fit_to_be_published(world, tmp_path, damage, message):
    folder = made.copy(world["merged"], tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        plan_upload(folder, "me/m", **LICENSE)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (str(nano_path()), "comes from nano, the base that is shipped"),
        ("facebook/musicgen-large", "comes from facebook/musicgen-large, not from facebook/musicgen-small"),
        ("facebook/musicgen-small", None),
        ("/models/small", None),
    ],
)
def test_a_base_that_the_model_does_not_come_from_is_refused(world, tmp_path, recorded, message):
    """Fault: a card that names another base, with its licence, than the weights were trained from."""
    folder = made.copy(world["merged"], tmp_path / "m")
    write_provenance(folder, Provenance("student", base_model=recorded))
    if message is None:
        assert (
            "facebook/musicgen-small"
            in plan_upload(folder, "me/m", base_model="facebook/musicgen-small").card
        )
        return
    with pytest.raises(ValueError, match=message):
        plan_upload(folder, "me/m", base_model="facebook/musicgen-small")


def test_an_adapter_of_a_student_is_not_published_as_one_of_its_base(world, tmp_path):
    """Fault: quality student in full, diversity adapter on top, and the Hub's adapter is loaded without the first."""
    folder = made.copy(world["adapter"], tmp_path / "a")
    made.edit_json(folder / "adapter_config.json", base_model_name_or_path=str(world["full1"]))
    write_provenance(folder, Provenance("student", base_model="user/base"))
    with pytest.raises(ValueError, match=r"adapter of .*full1, itself a student of user/base"):
        plan_upload(folder, "me/a", base_model="user/base", **LICENSE)
    assert "me/full1" in plan_upload(folder, "me/a", base_model="me/full1", **LICENSE).card


def test_an_adapter_is_published_for_the_weights_that_it_was_trained_on(world, monkeypatch):
    """The named id is compared where it is in the cache, and where it is not, that is said."""
    for cached, name in ((world["base"], "me/copy"), (world["full2"], "me/other")):
        monkeypatch.setattr(planning, "locate", lambda source, cached, folder=cached: folder)
        if name == "me/copy":
            assert name in plan_upload(world["adapter"], "me/a", base_model=name, **LICENSE).card
        else:
            with pytest.raises(ValueError, match=r"adapter.*me/other is another model.*differs"):
                plan_upload(world["adapter"], "me/a", base_model=name, **LICENSE)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"me/absent is not in the cache.*cannot be checked"):
        plan_upload(world["adapter"], "me/a", base_model="me/absent", **LICENSE)


@pytest.mark.parametrize("repo_id", ["merged", "me/", "me/a b", "a/b/c", "me/.x"])
def test_repository_ids(world, repo_id):
    with pytest.raises(ValueError, match=r"id|owner"):
        plan_upload(world["merged"], repo_id, **LICENSE)


def test_an_unknown_licence_is_asked_for(world):
    with pytest.raises(ValueError, match="--license"):
        plan_upload(world["merged"], "me/m")


def test_broken_weights_are_found_by_loading_them(world, tmp_path):
    """The check before the upload: a truncated file, an adapter without effect."""
    folder = made.copy(world["merged"], tmp_path / "m")
    content = (folder / made.MODEL).read_bytes()
    (folder / made.MODEL).write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"does not load.*truncated"):
        publish(folder, "me/m", **LICENSE)
    idle = merge_checkpoints([world["base"], world["base"]], 0.5, tmp_path / "idle")
    write_provenance(idle, Provenance("student", base_model=str(world["base"])))
    made.edit_json(idle / "generation_config.json", guidance_scale=1.0)
    with pytest.raises(ValueError, match="exactly the weights of its base"):
        publish(idle, "me/m", **LICENSE)


def test_a_card_that_somebody_wrote_is_published_as_it_is(world, tmp_path):
    """Ours is rendered anew with the repository's name; a hand-written one is not touched, but needs a
    licence."""
    folder = made.copy(world["merged"], tmp_path / "m")
    assert 'model="me/elsewhere"' in plan_upload(folder, "me/elsewhere", **LICENSE).card
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="licence"):
        plan_upload(folder, "me/m", **LICENSE)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert plan_upload(folder, "me/m").card == "---\nlicense: mit\n---\n# Mine\n"


def test_samples_for_the_card(world, tmp_path, hub):
    """Clips with the folder's own length and settings, listed, playable and sent; a second run makes none
    anew."""
    folder = made.copy(world["lora1"], tmp_path / "student")
    made.edit_json(folder / "adapter_config.json", base_model_name_or_path=str(world["base"]))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "generation_config.json",
    ):
        (folder / name).write_bytes((world["merged"] / name).read_bytes())
    options = {"merged": True, "samples": ["sad cello", "fast flute"], **LICENSE}
    publish(folder, "me/m", dry_run=False, token=TOKEN, endpoint=hub.url, **options)
    [first, second] = sorted((folder / "samples").glob("*.wav"))
    audio, rate = soundfile.read(first)
    assert (len(audio), rate) == (17 * 64, 3200)
    files = hub.repos["me/m"].files
    assert files[f"samples/{second.name}"] == second.read_bytes()
    assert f'<audio controls src="samples/{first.name}"></audio>' in files["README.md"].decode()
    made_at = first.stat().st_mtime_ns
    publish(folder, "me/m", **options)
    assert first.stat().st_mtime_ns == made_at
    with pytest.raises(ValueError, match="samples"):
        publish(folder, "me/m", **(options | {"samples": ["another prompt"]}))


@pytest.fixture
def evaluation(world, tmp_path):
    """Results of the merge at 0.3 under two names, of another model, and of a system that failed."""
    from diverse_cfg.evaluation.results import Estimate, Results, SystemResult
    from diverse_cfg.evaluation.systems import System, single

    mixture = (((str(world["lora1"]), 0.7), (str(world["lora2"]), 0.3)),)
    metrics = {"vendi_heldout": Estimate(2.5, 2.25, 2.75, 0.1, 48), "missing": Estimate(1.0)}
    rows = [
        SystemResult(System("mixed", mixture), metrics=metrics, flags=["three clips are silent"]),
        SystemResult(System("folder", single(world["merged"])), metrics=metrics),
        SystemResult(System("guided", single(world["merged"]), guidance_scale=3.0), metrics=metrics),
        SystemResult(System("other", single(world["full1"])), metrics=metrics),
        SystemResult(System("failed", single(world["merged"])), error="no memory"),
    ]
    Results([f"prompt {i}" for i in range(48)], rows, {"num_generations": 8}).save(tmp_path / "evaluation")
    return tmp_path / "evaluation"


def test_results_of_this_very_model_reach_its_card(world, tmp_path, evaluation):
    """Found by its path or by its recipe, with interval, direction and what a reader must know."""
    from diverse_cfg.evaluation.metrics import METRICS

    folder = made.copy(world["merged"], tmp_path / "m")
    card = publish(folder, "me/m", check=False, results=(evaluation, "mixed"), **LICENSE).card
    better = {1: "higher", -1: "lower"}[METRICS["vendi_heldout"].better]
    row = next(line for line in card.splitlines() if "2.25 … 2.75" in line)
    assert METRICS["vendi_heldout"].label in row and f"{better} is better" in row and "| 2.5 |" in row
    assert "48 prompts; note: three clips are silent, 384 clips" in card
    publishing.add_results(world["merged"], evaluation, "folder")
    (world["merged"] / "evaluation.json").unlink()


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("other", "which is not"),
        ("guided", "guidance_scale=3"),
        ("failed", "no memory"),
        ("nobody", "no system 'nobody'"),
    ],
)
def test_results_of_another_model_do_not(world, evaluation, system, message):
    with pytest.raises(ValueError, match=message):
        publishing.add_results(world["merged"], evaluation, system)
    assert not (world["merged"] / "evaluation.json").exists()
