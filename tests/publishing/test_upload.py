"""Publishing on a fake Hub: what arrives, what is refused, and that no failure passes as success."""

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from diverse_cfg.cards import Sample, render_card, write_samples
from diverse_cfg.publishing import plan_upload, upload
from diverse_cfg.publishing.upload import Published
from tests import checkpoints as made
from tests.fake_hub import SILENCE_S, TOKEN

# `publishing.upload` is the function of that name.
upload_module = sys.modules["diverse_cfg.publishing.upload"]
ROOT = Path(__file__).parent.parent.parent
LICENSE = {"license": made.LICENSE}


def send(plan, hub, **options):
    return upload(plan, token=TOKEN, endpoint=hub.url, wait_s=0.0, **options)


def assert_published(hub, plan, private=True):
    repo = hub.repos[plan.repo_id]
    assert repo.private is private
    assert set(repo.files) == {".gitattributes"} | {file.path_in_repo for file in plan.files}
    for file in plan.files:
        assert repo.files[file.path_in_repo] == file.content


def test_upload_in_one_commit(plan, hub):
    """Everything arrives, nothing else, in a private repository, visible at once."""
    done = send(plan, hub)
    assert_published(hub, plan)
    assert len(hub.repos["me/merged"].commits) == 2, "the repository's first commit and ours"
    assert done == Published(
        f"{hub.url}/me/merged", hub.repos["me/merged"].commits[-1], True, len(plan.files)
    )
    assert (
        render_card(plan.folder, repo_id="me/merged", **LICENSE)
        == hub.repos["me/merged"].files["README.md"].decode()
    )


def test_publishing_again_changes_nothing(plan, hub):
    send(plan, hub)
    again = send(plan, hub)
    assert again.num_uploaded == 0
    assert len(hub.repos["me/merged"].commits) == 2
    assert_published(hub, plan)


def test_public_only_when_asked(world, hub):
    public = plan_upload(world["merged"], "me/merged", private=False, **LICENSE)
    assert "PUBLIC" in public.describe()
    send(public, hub)
    assert_published(hub, public, private=False)


@pytest.mark.parametrize(("exists", "wanted"), [(False, True), (True, False)])
def test_a_repository_of_another_visibility_is_refused(world, hub, exists, wanted):
    """A private model must not go into a public repository because that one happened to exist."""
    hub.add("me/merged", private=exists)
    plan = plan_upload(world["merged"], "me/merged", private=wanted, **LICENSE)
    with pytest.raises(FileExistsError, match="nothing was uploaded"):
        send(plan, hub, update=True)
    assert hub.count("commit|batch|storage") == 0


def test_a_hub_that_creates_it_public_is_noticed(plan, hub):
    """Organisations may force a visibility: look before the first byte is sent."""
    hub.create_public = True
    with pytest.raises(FileExistsError, match="nothing was uploaded"):
        send(plan, hub)
    assert hub.count("commit|batch|storage") == 0


def test_a_repository_with_files_is_not_overwritten(plan, hub):
    repo = hub.add("me/merged", notes__txt=b"mine", model__safetensors=b"old")
    with pytest.raises(FileExistsError, match="--update"):
        send(plan, hub)
    assert repo.files["model.safetensors"] == b"old"
    send(plan, hub, update=True)
    assert repo.files["notes.txt"] == b"mine", "files that we do not write stay"
    assert repo.files["model.safetensors"] == (plan.folder / made.MODEL).read_bytes()


def test_another_card_is_not_overwritten(plan, hub):
    repo = hub.add("me/merged", README__md=b"# Written on the Hub")
    with pytest.raises(FileExistsError, match=r"another README\.md"):
        send(plan, hub, update=True)
    assert len(repo.commits) == 1
    send(plan, hub, update=True, card="keep")
    assert repo.files["README.md"] == b"# Written on the Hub"
    assert repo.files["config.json"]
    send(plan, hub, update=True, card="overwrite")
    assert repo.files["README.md"].decode() == plan.card


# ---- failures


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/api/models/", 401, PermissionError),
        ("POST", "/api/repos/create", 403, PermissionError),
        ("POST", "/preupload/", 403, PermissionError),
        ("POST", "/preupload/", 404, FileNotFoundError),
        ("POST", "/objects/batch", 401, PermissionError),
        ("PUT", "/storage/", 403, PermissionError),
        ("POST", "/commit/", 403, PermissionError),
        ("POST", "/commit/", 404, FileNotFoundError),
        ("POST", "/commit/", 400, OSError),
        ("POST", "/commit/", 413, OSError),
    ],
)
def test_refusals_are_final(plan, hub, method, path, status, error):
    """No retry helps; the message says who must do what; nothing is visible."""
    hub.fail(method, path, status, times=1000, body={"error": f"no ({TOKEN})"})
    with pytest.raises(error) as caught:
        send(plan, hub)
    assert TOKEN not in str(caught.value)
    assert hub.count(f"{method} .*{path}") == 1
    assert "me/merged" not in hub.repos or set(hub.repos["me/merged"].files) == {".gitattributes"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/models/"),
        ("POST", "/preupload/"),
        ("POST", "/batch"),
        ("PUT", "/storage/"),
        ("POST", "/commit/"),
    ],
)
@pytest.mark.parametrize("how", [429, 503, "silence", "drop"])
def test_passing_troubles_pass(plan, hub, method, path, how):
    """One hiccup anywhere and the upload still arrives, in one commit, without waiting for a silent
    server."""
    hub.fail(method, path, how)
    start = time.monotonic()
    send(plan, hub)
    assert time.monotonic() - start < SILENCE_S / 2
    assert_published(hub, plan)
    assert len(hub.repos["me/merged"].commits) == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/models/"),
        ("POST", "/batch"),
        ("PUT", "/storage/"),
        ("POST", "/commit/"),
        ("POST", "/create"),
    ],
)
@pytest.mark.parametrize("how", [429, "drop"])
def test_lasting_troubles_end(plan, hub, method, path, how):
    """It gives up after a few attempts and does not claim success; a later run goes on."""
    hub.fail(method, path, how, times=1000)
    with pytest.raises(ConnectionError, match="run again"):
        send(plan, hub)
    assert "me/merged" not in hub.repos or set(hub.repos["me/merged"].files) == {".gitattributes"}
    hub.faults.clear()
    send(plan, hub)
    assert_published(hub, plan)


@pytest.mark.parametrize("how", [500, 504, "silence", "drop"])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(plan, hub, how):
    hub.fail("POST", "/commit/", how, after=True)
    done = send(plan, hub)
    assert_published(hub, plan)
    assert len(hub.repos["me/merged"].commits) == 2
    assert done.commit == hub.repos["me/merged"].commits[-1]


def test_a_creation_whose_answer_is_lost(plan, hub):
    """The second request meets 409, or finds what the first one made."""
    hub.fail("POST", "/api/repos/create", "drop", after=True)
    send(plan, hub)
    assert_published(hub, plan)


def test_an_interrupted_upload_goes_on(world, tmp_path, hub):
    """Large files that arrived are not sent again; nothing was visible in between."""
    folder = made.copy(world["merged"], tmp_path / "m")
    (folder / "samples").mkdir()
    (folder / "samples" / "a.wav").write_bytes(b"RIFF" * 1000)
    write_samples(folder, [Sample("samples/a.wav", "sad cello")])
    plan = plan_upload(folder, "me/m", **LICENSE)
    hub.fail("POST", "/commit/", 503, times=1000)
    with pytest.raises(ConnectionError):
        send(plan, hub)
    assert set(hub.repos["me/m"].files) == {".gitattributes"}
    hub.faults.clear()
    hub.requests.clear()
    send(plan, hub)
    assert hub.count("PUT /storage/") == 0
    assert_published(hub, plan)


def test_ctrl_c_half_way(plan, hub, monkeypatch):
    """The interruption goes through, nothing is visible, and the next run completes it."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub._commit_api, "_prepare_commit_payload", interrupt)
        with pytest.raises(KeyboardInterrupt):
            send(plan, hub)
    assert set(hub.repos["me/merged"].files) == {".gitattributes"}
    send(plan, hub)
    assert_published(hub, plan)


def test_somebody_else_commits_meanwhile(plan, hub):
    """412 from the parent check: theirs stays, ours is not half in it, and the message says that nothing
    is."""
    repo = hub.add("me/merged")

    def meanwhile():
        hub.before_commit = None
        repo.files["theirs.txt"] = b"theirs"
        repo.commit()

    hub.before_commit = meanwhile
    with pytest.raises(FileExistsError, match="nothing of ours"):
        send(plan, hub)
    assert set(repo.files) == {".gitattributes", "theirs.txt"}


def test_two_publishers_at_once(plan, hub):
    """Both start from nothing: one commit of the content in the end, and nobody reports what is not there."""
    barrier, results = threading.Barrier(2, timeout=10), []

    def wait_once():
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait()

    hub.before_commit = wait_once

    def run():
        try:
            results.append(send(plan, hub))
        except OSError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert any(isinstance(result, Published) for result in results)
    assert_published(hub, plan)


def test_a_server_that_forgets_a_file_is_not_believed(plan, hub):
    """200 for the commit, and yet the weights are not in the listing."""
    hub.lose_on_commit = "model.safetensors"
    with pytest.raises(OSError, match=r"lacks or differs in model\.safetensors.*incomplete"):
        send(plan, hub)


def test_without_a_token_nothing_is_sent(plan, hub, monkeypatch):
    monkeypatch.setattr(upload_module, "get_token", lambda: None)
    with pytest.raises(PermissionError, match="HF_TOKEN"):
        upload(plan, endpoint=hub.url)
    assert hub.requests == []
    with pytest.raises(PermissionError, match="does not accept the token"):
        upload(plan, token="hf_wrong", endpoint=hub.url, wait_s=0.0)
    with pytest.raises(PermissionError, match="may not write to other/merged"):
        upload(plan_upload(plan.folder, "other/merged", **LICENSE), token=TOKEN, endpoint=hub.url, wait_s=0.0)


def test_offline_says_so(plan, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        send(plan, hub)


def test_a_hub_that_is_not_there(plan, hub):
    closed = "http://127.0.0.1:9"
    with pytest.raises(ConnectionError):
        upload(plan, token=TOKEN, endpoint=closed, wait_s=0.0)


@pytest.mark.parametrize(
    "fault", [None, ("POST", "/commit/", 500), ("PUT", "/storage/", 403), ("GET", "/api/", 401)]
)
def test_no_token_in_output_or_logs(plan, hub, capfd, fault):
    """Every logger at its most talkative, and a server that repeats the token in its refusals."""
    stream = io.StringIO()
    handler, root = logging.StreamHandler(stream), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    huggingface_hub.logging.set_verbosity_debug()
    huggingface_hub.logging.get_logger().addHandler(handler)
    if fault:
        hub.fail(*fault, times=3, body={"error": f"your token {TOKEN} is bad"})
    text = ""
    try:
        text = repr(send(plan, hub, attempts=2)) + plan.describe()
    except OSError as error:
        import traceback

        text = "".join(traceback.format_exception(error))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        huggingface_hub.logging.get_logger().removeHandler(handler)
        huggingface_hub.logging.set_verbosity_warning()
    captured = capfd.readouterr()
    everything = text + stream.getvalue() + captured.out + captured.err
    assert re.search("me/merged", everything)
    assert TOKEN not in everything
    assert TOKEN[3:20] not in everything


@pytest.mark.slow
def test_the_trainers_own_push(hub, tmp_path):
    """`push_to_hub=True` in the trainer's settings goes through transformers: the same card, and no
    guidance."""
    program = (
        "import sys\n"
        "from tests.training import tiny_trainer\n"
        "hub = {'push_to_hub': True, 'hub_model_id': 'me/student', 'hub_private_repo': True}\n"
        "trainer = tiny_trainer(sys.argv[1], **hub)\n"
        "trainer.train()\n"
        "trainer.save_model()\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(ROOT),
        "CI": "1",  # keeps TRL's telemetry quiet
    }
    command = [sys.executable, "-c", program, str(tmp_path / "student")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    repo = hub.repos["me/student"]
    assert repo.private
    assert repo.files["README.md"].decode() == render_card(
        tmp_path / "student", repo_id="me/student", tags=["trl"]
    )
    assert json.loads(repo.files["generation_config.json"])["guidance_scale"] == 1.0
    assert repo.files["model.safetensors"] == (tmp_path / "student" / "model.safetensors").read_bytes()
    assert not [name for name in repo.files if name.endswith((".bin", ".pt"))]
