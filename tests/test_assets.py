"""`nano_path` finds what is shipped and names what is not."""

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
