"""`diverse-cfg publish`: without `--upload` nothing leaves the machine, and every flag arrives."""

from pathlib import Path

import pytest

import diverse_cfg.publishing as publishing
from diverse_cfg.cli import main


@pytest.fixture
def published(monkeypatch):
    """The calls of `publish`, answered as an upload would be."""
    calls = []

    def publish(*args, **kwargs):
        calls.append((args, kwargs))
        return publishing.Published("https://hub/user/name", "c0ffee", kwargs["private"], 7)

    monkeypatch.setattr(publishing, "publish", publish)
    return calls


def test_the_defaults_are_harmless(published):
    """Catches a public repository, an upload or an overwritten card that nobody asked for."""
    assert main(["publish", "folder", "user/name"]) == 0
    args, kwargs = published[0]
    assert args == ("folder", "user/name")
    harmless = {"private": True, "dry_run": True, "update": False, "check": True, "merged": False}
    assert {name: kwargs[name] for name in harmless} == harmless and kwargs["card"] == "refuse"
    assert (kwargs["base_model"], kwargs["license"]) == (None, None)
    assert (kwargs["tags"], kwargs["samples"]) == ([], [])


def test_every_flag_arrives(published, capsys):
    flags = ["--upload", "--public", "--merged", "--update", "--no-check", "--card", "keep"]
    names = [
        "--base-model",
        "a/b",
        "--license",
        "mit",
        "--tag",
        "x",
        "--tag",
        "y",
        "--sample",
        "z",
        "--results",
        "runs/eval",
        "merged",
    ]
    assert main(["publish", "folder", "user/name", *flags, *names]) == 0
    decided = {
        "private": False,
        "dry_run": False,
        "merged": True,
        "update": True,
        "check": False,
        "card": "keep",
    }
    named = {"base_model": "a/b", "license": "mit", "tags": ["x", "y"], "samples": ["z"]}
    assert published[0][1] == decided | named | {"results": ["runs/eval", "merged"], "space": None}
    assert capsys.readouterr().out == "https://hub/user/name (PUBLIC, 7 files)\n"


def test_a_plan_is_shown_and_says_that_nothing_was_sent(monkeypatch, capsys):
    card = publishing.PlannedFile("README.md", b"the card")
    plan = publishing.UploadPlan(Path("folder"), "user/name", True, (card,))
    monkeypatch.setattr(publishing, "publish", lambda *args, **kwargs: plan)
    assert main(["publish", "folder", "user/name"]) == 0
    text = capsys.readouterr().out
    assert "user/name (private)" in text
    assert "the card" in text
    assert text.endswith("Nothing was sent. Add --upload to publish it.\n")


def test_a_folder_of_another_program_is_one_line(tiny_folder, refused):
    assert "diverse_cfg.json" in refused("publish", tiny_folder, "user/name")
