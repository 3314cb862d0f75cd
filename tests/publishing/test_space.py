"""The page as a Space: what it consists of, that it names nothing of this machine, and its one commit."""

import ast
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from diverse_cfg.publishing import UploadPlan, plan_space, publish_space
from tests import checkpoints as made
from tests.fake_hub import TOKEN

MODELS = ["me/quality", "me/diversity"]


def texts(plan):
    return {file.path_in_repo: file.content.decode() for file in plan.files if file.size < 10**6}


def test_a_space_is_a_page_its_needs_and_a_card():
    plan = plan_space("me/play", MODELS, base="facebook/musicgen-small", license="cc-by-nc-4.0")
    files = texts(plan)
    assert set(files) == {"README.md", "app.py", "requirements.txt"}
    front = yaml.safe_load(files["README.md"].split("---")[1])
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "cc-by-nc-4.0")
    assert front["sdk_version"] == version("gradio")
    assert front["models"] == [*MODELS, "facebook/musicgen-small"]
    call = next(
        node for node in ast.walk(ast.parse(files["app.py"]))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "build_space"
    )  # fmt: skip
    assert ast.literal_eval(call.args[0]) == MODELS
    assert ast.literal_eval(call.keywords[0].value) == "facebook/musicgen-small"
    needed = files["requirements.txt"].split("\n")
    assert needed == [f"diverse-cfg[play]=={version('diverse-cfg')}", f"gradio=={version('gradio')}", ""]
    assert "diverse-cfg play me/quality me/diversity" in files["README.md"]
    assert str(Path.home()) not in "".join(files.values()) and "/work" not in "".join(files.values())


def test_a_wheel_travels_with_what_it_needs(tmp_path):
    """Catches requirements that name a file, which a Space does not have yet when it installs them."""
    wheel = tmp_path / "diverse_cfg-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    plan = plan_space("me/play", MODELS[:1], wheel=wheel)
    assert wheel.name in {file.path_in_repo for file in plan.files}
    needed = texts(plan)["requirements.txt"].split("\n")
    assert any(line.startswith("torch") for line in needed) and not any("pytest" in line for line in needed)
    assert not any("diverse" in line or ".whl" in line for line in needed)
    for wrong in (tmp_path / "nothing.whl", tmp_path):
        with pytest.raises(ValueError, match="is no wheel of diverse-cfg"):
            plan_space("me/play", MODELS[:1], wheel=wrong)


@pytest.mark.parametrize(
    ("space", "models"),
    [("play", MODELS), ("me/play", [os.sep + os.path.join("home", "me", "student")]), ("a/b/c", MODELS)],
)
def test_names_that_are_no_hub_ids(space, models):
    with pytest.raises(ValueError, match=r"Hub repository id|lacks its owner"):
        plan_space(space, models)


def test_it_is_published_in_one_commit(hub):
    assert isinstance(publish_space("me/play", MODELS), UploadPlan) and not hub.requests
    published = publish_space("me/play", MODELS, dry_run=False, token=TOKEN, endpoint=hub.url)
    repo = hub.repos["me/play"]
    assert published.url == f"{hub.url}/spaces/me/play" and published.private and repo.private
    assert repo.kind == ("space", "gradio") and hub.count("POST .*/commit/main") == 1
    assert repo.files["app.py"] == dict(texts(plan_space("me/play", MODELS)))["app.py"].encode()
    assert not hub.count("/api/models/")
    again = publish_space("me/play", MODELS, dry_run=False, token=TOKEN, endpoint=hub.url)
    assert again.num_uploaded == 0
    with pytest.raises(FileExistsError, match="has files already"):
        publish_space("me/play", MODELS[:1], dry_run=False, token=TOKEN, endpoint=hub.url)


def test_the_command_makes_both_and_the_card_links_the_space(world, capsys):
    from diverse_cfg.cli import main

    words = ["publish", str(world["merged"]), "me/merged", "--license", made.LICENSE, "--no-check"]
    assert main([*words, "--space", "me/play", "--space-beside", "me/quality"]) == 0
    told = capsys.readouterr().out
    assert "In the browser: [me/play](https://huggingface.co/spaces/me/play)." in told
    assert "→ space me/play (private)" in told and "app.py" in told and told.count("Nothing was sent") == 1
    assert "me/quality](https://huggingface.co/me/quality), [me/merged]" in told
    assert main([*words, "--space-beside", "me/quality"]) == 2
    assert "--space-beside me/quality has no effect without --space" in capsys.readouterr().err
    assert main([*words, "--space", "play"]) == 2
    assert "lacks its owner" in capsys.readouterr().err


def test_zero_gpu_plays_every_wish_on_its_gpu(monkeypatch, tmp_path):
    """Catches a page that asks for no GPU, and one whose Stop does not reach the other process."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from types import SimpleNamespace

    from diverse_cfg.playing import page
    from diverse_cfg.playing.player import Wish
    from tests.playing.test_page import Scripted

    calls = []

    def gpu(function):
        def called(*args):
            calls.append(args)
            yield from function(*args)

        return called

    spaces = SimpleNamespace(GPU=gpu, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    scripted = Scripted()
    monkeypatch.setattr(page, "Player", lambda models, base=None: scripted)
    play = scripted.play

    def without_threads(wish, **how):
        assert not how
        import threading

        return play(wish, cancelled=threading.Event())

    monkeypatch.setattr(scripted, "play", without_threads)
    built, options = page.build_space(["me/m"])
    assert options["allowed_paths"] and not options["share"]
    stage = page.Stage(built.player, tmp_path, None)
    tab = stage.tab("a")
    making = stage.make(tab, Wish("piano", 3, merge_weight=0.5))
    next(making), next(making)
    tab.cancelled.set()
    list(making)
    assert len(calls) == 1 and "Stopped" in tab.status["text"]
    assert stage.view(tab)["keeps"] is None
