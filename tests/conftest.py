"""What every test gets: no network, no telemetry, and the tiny MusicGen of `tests/tiny.py`."""

import functools
import os
import socket
import sys
from pathlib import Path

# Before anything imports transformers, datasets or trl: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Converted AudioCraft checkpoints go where the session's files go, not into the developer's home."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DIVERSE_CFG_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _offline(request, monkeypatch):
    """A test that reaches for another machine fails at once, also where a network happens to be."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test without the network marker connected to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def refused(capsys):
    """Gives the one line that a command says which is refused."""
    from diverse_cfg.cli import main

    def run(*words):
        assert main([str(word) for word in words]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("diverse-cfg: error: ")
        return line.removeprefix("diverse-cfg: error: ")

    return run


@pytest.fixture
def nano_recipe(monkeypatch):
    """The folder `recipes/nano`, whose modules can be imported while the test runs."""
    folder = Path(__file__).parents[1] / "recipes" / "nano"
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [
        n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(folder))
    ]:
        del sys.modules[name]


@pytest.fixture
def tiny_model():
    """A fresh tiny MusicGen, free to be changed."""
    from tests.tiny import tiny_musicgen

    return tiny_musicgen()


@pytest.fixture(scope="session")
def tiny_processor():
    from tests.tiny import tiny_processor

    return tiny_processor()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny MusicGen checkpoint, shared by the session: read it, never write into it."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "musicgen")


@pytest.fixture(scope="session")
def tiny_stereo_folder(tmp_path_factory):
    """The same with two channels (twice the codebooks, pairs of them sharing a delay)."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "musicgen-stereo", audio_channels=2)


@pytest.fixture
def decoder_rows(monkeypatch):
    """Rows of every decoder pass: clips, doubled when guidance is on."""
    from transformers.models.musicgen.modeling_musicgen import MusicgenForCausalLM

    rows, forward = [], MusicgenForCausalLM.forward

    @functools.wraps(forward)  # the composite model inspects the decoder's signature
    def counting(self, input_ids=None, **kwargs):
        rows.append(input_ids.shape[0] // self.num_codebooks)
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(MusicgenForCausalLM, "forward", counting)
    return rows
