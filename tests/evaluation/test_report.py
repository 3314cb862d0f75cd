"""The page: complete in its folder, escaped, at one loudness, and shown by a real browser."""

import html.parser
import os
import shutil
import signal
import struct
import subprocess
import threading
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from diverse_cfg.acoustics import loudness
from diverse_cfg.evaluation.generations import Player
from diverse_cfg.evaluation.report import Picture, _write_gallery
from diverse_cfg.evaluation.results import Results
from diverse_cfg.evaluation.sweep import write_audio
from diverse_cfg.evaluation.systems import System, single
from tests.evaluation.worlds import save_sibling, small_sweep
from tests.tiny import PROMPTS, save_tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADLESS = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A sweep over two systems and one that fails."""
    root = tmp_path_factory.mktemp("sweep")
    sweep = small_sweep(root)
    systems = [
        System("base", single(save_tiny(root / "a")), role="base"),
        System("<b>student</b> & co", single(save_sibling(root / "b"))),
        System("gone", single(root / "nowhere")),
    ]
    return sweep, sweep.run(systems, progress=False)


@pytest.fixture
def page(evaluated, tmp_path):
    sweep, results = evaluated
    files = write_audio(results, sweep, tmp_path, 2, 2)
    (tmp_path / "front.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    picture = Picture("front.svg", 'A "front"')
    _write_gallery(results, files, tmp_path, title="Listen <here>", introduction="1 < 2", pictures=[picture])
    return tmp_path


class Links(html.parser.HTMLParser):
    """What a page loads."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_every_player_has_its_file_and_nothing_comes_from_elsewhere(page):
    """Catches absolute paths and links to other machines: the folder must work when it is mailed."""
    links = Links((page / "index.html").read_text(encoding="utf-8"))
    players = [link for link in links.found if link.endswith(".wav")]
    assert len(players) == 2 * 2 * 2 == len(set(players))
    assert {link[:-4] for link in links.found if link.endswith(".png")} == {link[:-4] for link in players}
    for link in links.found:
        assert "://" not in link and not link.startswith("/")
        assert (page / link).is_file(), link


def test_names_and_prompts_are_text(page):
    """Catches a page without escaping: a prompt may hold anything."""
    text = (page / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;student&lt;/b&gt; &amp; co" in text and "<b>student" not in text
    assert "Listen &lt;here&gt;" in text and "1 &lt; 2" in text
    assert "b" not in Links(text).tags


def test_failures_are_on_the_page(page):
    text = (page / "index.html").read_text(encoding="utf-8")
    assert "failed: FileNotFoundError: there is no folder" in text
    assert [text.count(prompt) for prompt in PROMPTS] == [1, 1, 0, 0]


def test_the_page_says_what_its_numbers_rest_on(page, evaluated, tmp_path):
    """Catches "3 clips of each, over prompts" above numbers of two sampling and three training seeds."""
    text = (page / "index.html").read_text(encoding="utf-8")
    assert "Means over 4 held-out prompts, 3 clips of each, with" in text
    assert "intervals over prompts. " in text
    assert "belong to all 3 clips for the prompt; the players hold the first of them." in text
    rows = [
        replace(row, system=replace(row.system, replicates=row.system.replicates * count))
        for row, count in zip(evaluated[1].systems, (1, 3, 1), strict=True)
    ]
    several = Results(evaluated[1].prompts, rows, {**evaluated[1].settings, "seeds": [0, 1]})
    _write_gallery(several, {}, tmp_path / "several", title="x")
    text = (tmp_path / "several" / "index.html").read_text(encoding="utf-8")
    assert "3 clips of each under each of 2 sampling seeds, of students with up to 3 training seeds" in text
    assert "intervals over prompts, and over training seeds where a system has three or more." in text
    assert "belong to all 6 clips of the system&#39;s first training seed for the prompt" in text


def test_clips_are_played_at_one_loudness(evaluated, tmp_path, monkeypatch):
    """Catches copies that are as loud as they came: the louder of two clips always seems better."""

    def tones(self, codes):
        time = torch.arange(3200) / 3200
        loud = 0.02 * (1 + torch.arange(len(codes)))[:, None]
        return loud * torch.sin(2 * torch.pi * 300 * time)

    monkeypatch.setattr(Player, "decode", tones)
    files = write_audio(evaluated[1], evaluated[0], tmp_path, 1, 3)
    levels = [loudness(*soundfile.read(tmp_path / file)) for file in files["base", 0]]
    np.testing.assert_allclose(levels, -23, atol=0.1)


def test_clips_are_decoded_once(page, evaluated, monkeypatch):
    """A page that is written again finds its clips; they are those of the table, and as long."""
    files = sorted((page / "audio" / "00-base").glob("*.wav"))
    assert [soundfile.info(path).frames for path in files] == [12 * 64] * 4
    monkeypatch.setattr(Player, "decode", lambda *_: pytest.fail("decoded again"))
    assert len(write_audio(evaluated[1], evaluated[0], page, 2, 2)) == 4


def console_until(text, path, seconds=180):
    """The line with `text` that the page at `path` writes to its console.

    The browser stays open until then. (Dumping the page after a budget of virtual time is a race: media load
    on other threads, in real time.)
    """
    profile = path.parent / "profile"
    command = [
        *HEADLESS,
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
    ]
    browser = subprocess.Popen(
        [*command, path.as_uri()], stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    deadline = threading.Timer(seconds, os.killpg, (browser.pid, signal.SIGKILL))
    deadline.start()
    try:
        return next((line for line in browser.stderr if text in line), "")
    finally:
        deadline.cancel()
        os.killpg(browser.pid, signal.SIGKILL)
        browser.communicate()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_it(page, tmp_path):
    """The page is laid out, its script runs, and the figure and every clip load from the folder alone."""
    source = (page / "index.html").read_text(encoding="utf-8")
    probe = """<script>addEventListener("load", async () => {
      const ready = [...document.querySelectorAll("audio")].map(player => new Promise(done => {
        player.onloadedmetadata = () => done(player.duration > 0); player.onerror = () => done(false);
        player.preload = "metadata"; player.load(); }));
      const played = (await Promise.all(ready)).filter(Boolean).length; const image =
      document.querySelector("img"); console.log(`seen: clips ${played} image ${image.complete &&
      image.naturalWidth > 0} rows ${document.querySelectorAll("table.numbers tbody tr").length}`);
    });</script></body>"""
    (page / "probe.html").write_text(source.replace("</body>", probe), encoding="utf-8")
    assert "seen: clips 8 image true rows 3" in console_until("seen:", page / "probe.html")
    picture = page / "screenshot.png"
    subprocess.run(
        [*HEADLESS, "--window-size=1200,900", f"--screenshot={picture}", (page / "index.html").as_uri()],
        capture_output=True,
        timeout=180,
        check=True,
    )
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert (width, height) == (1200, 900)
    assert picture.stat().st_size > 10_000  # an empty page compresses to far less
