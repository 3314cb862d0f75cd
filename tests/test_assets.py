"""`nano_path` finds what is shipped and names what is not."""

import subprocess
import sys

import pytest

from diverse_cfg import assets


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """An installation whose assets we control."""
    monkeypatch.setattr(assets, "_NANO", tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (base / name).write_text("{}")
    return tmp_path


def test_the_base_is_the_default(shipped):
    assert assets.nano_path() == assets.nano_path("base") == shipped / "base"


def test_every_part_has_its_own_folder(shipped):
    """Catches two encoders that are one: the judge of diversity must not be the reward."""
    for part in assets.NANO_PARTS[1:]:
        (shipped / part).mkdir()
        (shipped / part / "config.json").write_text("{}")
    folders = [assets.nano_path(part) for part in assets.NANO_PARTS]
    assert len(set(folders)) == len(folders) == 7
    assert all(folder.is_dir() for folder in folders)


def test_a_half_copied_base_names_the_file(shipped):
    """Catches a wheel that lost its weights: the folder is there, the model is not."""
    (shipped / "base" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"nano base: .*model\.safetensors not found; reinstall"):
        assets.nano_path()


@pytest.mark.parametrize("part", ["judge", "prompts"])
def test_a_missing_or_empty_part_is_named(shipped, part):
    with pytest.raises(FileNotFoundError, match=f"nano {part}"):
        assets.nano_path(part)
    (shipped / part).mkdir()
    with pytest.raises(FileNotFoundError, match=f"nano {part}"):
        assets.nano_path(part)


@pytest.mark.parametrize("part", ["Base", "../base", "eval_encoder"])
def test_an_unknown_part_lists_the_known(shipped, part):
    with pytest.raises(
        ValueError,
        match="choose one of base, judge, reward-encoder, within-encoder, eval-encoder, prompts, open-prompts",
    ):
        assets.nano_path(part)


def test_only_nano_stands_for_what_is_shipped(shipped):
    """Catches a folder of the user's that is taken for a part of ours."""
    (shipped / "judge").mkdir()
    (shipped / "judge" / "judge.json").write_text("{}")
    assert assets.source("nano") == str(shipped / "base") and assets.source("nano", "judge") == str(
        shipped / "judge"
    )
    assert assets.source("me/nano", "judge") == "me/nano" and assets.source("judge") == "judge"


NAMES = """
import logging, sys
import diverse_cfg
from trl import RLOOTrainer
filters = list(logging.getLogger("transformers.configuration_utils").filters)

clips = diverse_cfg.fast_generate("nano", "a slow low melody on a piano", num_frames=4, seed=0, decode=False)
path = diverse_cfg.nano_path()
model, processor = diverse_cfg.load_policy(path), diverse_cfg.load_processor("nano")
same = diverse_cfg.fast_generate(
    model, "a slow low melody on a piano", processor=processor, num_frames=4, seed=0, decode=False
)
assert clips.codes.equal(same.codes)
assert diverse_cfg.load_policy("nano").name_or_path == str(path)
assert diverse_cfg.inspect_checkpoint("nano", base="nano")
assert len(diverse_cfg.load_prompts("nano", split="test")) and len(diverse_cfg.load_prompts("nano-open", split="test"))
assert diverse_cfg.load_embedder("eval-encoder").name
merged = diverse_cfg.merge_checkpoints(["nano", "nano"], 0.5, "merged")
args = diverse_cfg.CFGDiversityConfig(
    "run", teacher_model="nano", diversity_embedder="within-encoder", monitor_embedder="eval-encoder",
    num_generations=3, per_device_train_batch_size=3, max_steps=1, clip_seconds=0.5, report_to="none",
)
trainer = diverse_cfg.CFGDiversityTrainer("nano", args=args, train_dataset="nano")
assert trainer._base_model == args.teacher_model == str(path) and len(trainer.train_dataset) > 1000
model.save_pretrained("saved")
assert logging.getLogger("transformers.configuration_utils").filters == filters
"""


@pytest.mark.slow
def test_names_mean_the_same_in_python(tmp_path):
    """Fault: a name that only the command line knows, or a remark at every load that means nothing."""
    done = subprocess.run(
        [sys.executable, "-c", NAMES], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "vocabulary" not in done.stderr


def test_a_folder_of_ones_own_comes_first(tmp_path, monkeypatch):
    """Fault: somebody's folder called nano is silently another model, or other prompts."""
    monkeypatch.chdir(tmp_path)
    assert assets.shipped("nano") == str(assets.nano_path())
    for part in ("reward-encoder", "within-encoder", "eval-encoder"):
        assert assets.shipped_embedder(part) == str(assets.nano_path(part))
    assert assets.shipped_embedder("someone/eval-encoder") == "someone/eval-encoder"
    for name in ("nano", "eval-encoder"):
        (tmp_path / name).mkdir()
        assert assets.shipped(name) == assets.shipped_embedder(name) == name
    assert assets.shipped(model := object()) is model and assets.shipped(None) is None
