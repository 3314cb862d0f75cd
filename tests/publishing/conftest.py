"""Checkpoints to publish, a plan, and a Hub of this machine."""

import sys
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from diverse_cfg.publishing import plan_upload
from tests import checkpoints as made
from tests.fake_hub import FakeHub

# `publishing.upload` is the function of that name.
upload_module = sys.modules["diverse_cfg.publishing.upload"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made.make_merges(tmp_path_factory.mktemp("publishing"))


@pytest.fixture
def hub(monkeypatch):
    """A Hub of this machine; waiting is short, and the client may connect although tests are offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(upload_module, "_TIMEOUT_S", 0.5)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses between attempts
    huggingface_hub.close_session()
    with FakeHub() as fake:
        yield fake
    huggingface_hub.close_session()


@pytest.fixture
def plan(world):
    return plan_upload(world["merged"], "me/merged", license=made.LICENSE)
