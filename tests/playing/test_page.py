"""The page: what its stage shows, who may ask for it, and a musician's way through it in a real browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import soundfile

from diverse_cfg.playing import page as page_module
from diverse_cfg.playing.page import Stage, serve
from diverse_cfg.playing.player import Cost, Progress, Wish
from diverse_cfg.playing.takes import write_take
from tests.faults import largest_file
from tests.listening.test_listening import require_guarded
from tests.playing.test_takes import take, tone
from tests.playing.worlds import save_students
from tests.tiny import tiny_musicgen

ROOT = Path(__file__).parent.parent.parent


class Scripted:
    """A player that makes tones at once; `fails` is raised after the first."""

    names, moves, guided, base, guidance_scale = ["quality", "diversity"], True, False, "base", 3.0
    usual, longest, temperature = 1.0, 10.0, 1.0
    embedder = SimpleNamespace(name="encoder")
    fails: Exception | None = None
    told = None

    def __init__(self):
        self.model = tiny_musicgen()

    def title(self, wish):
        return f"λ = {wish.merge_weight:g}"

    def check(self, wish):
        if not wish.prompt.strip():
            raise ValueError("prompt 0 is ' ': every prompt needs text")

    def distance(self, takes):
        return 0.25 if len(takes) > 1 else None

    def play(self, wish, *, like=None, longer=None, guided=False, cancelled=None):
        for number in range(wish.num_takes):
            yield Progress(number / wish.num_takes, 1.6)
            if cancelled.is_set():
                return
            if number and self.fails:
                raise self.fails
            made = take(
                f"{wish.seed:04x}{number:02x}{'ab' if guided else 'cd'}", seed=wish.seed, number=number
            )
            yield made, tone(440)
        yield Cost(0.5, 1.0, 1234)


@pytest.fixture
def stage(tmp_path):
    for name in ("takes", "kept"):
        (tmp_path / name).mkdir()
    return Stage(Scripted(), tmp_path / "takes", tmp_path / "kept")


WISH = Wish("<b>piano</b>", num_takes=3, seed=7, merge_weight=0.5)


def test_takes_appear_one_by_one(stage):
    """Catches a page that waits for all of them."""
    tab = stage.tab("a")
    views = [view for view, _ in stage.make(tab, WISH) if view]
    counts = [sum(len(group["takes"]) for group in view["groups"]) for view in views]
    assert counts == [0, 1, 2, 3, 3]
    [group] = views[-1]["groups"]
    assert (group["title"], group["comparable"]) == ("λ = 0.5: “<b>piano</b>”", True)
    assert group["note"] == "mean distance 0.25 · sampled in 0.5 s, 1,234 decoder rows"
    assert len(views[-1]["map"]) == 3 and not tab.status["busy"]
    for shown in group["takes"]:
        assert Path(shown["url"].removeprefix("gradio_api/file=")).is_file()


def test_the_guided_base_stands_beside_its_takes(stage):
    tab = stage.tab("a")
    list(stage.make(tab, WISH))
    list(stage.guided(tab, 1))
    list(stage.make(tab, WISH))
    view = stage.view(tab)
    assert [(group["batch"], group["guided"], group["comparable"]) for group in view["groups"]] == [
        (1, False, False), (1, True, False), (3, False, True),
    ]  # fmt: skip
    assert view["batch"] == 3


def test_two_tabs_have_stages_of_their_own(stage):
    """Catches takes, or a Stop, of one tab in the other."""
    one, two = stage.tab("a"), stage.tab("b")
    making, other = stage.make(one, WISH), stage.make(two, WISH)
    next(making), next(other)
    one.cancelled.set()
    list(making), list(other)
    assert one.status["text"] == "Stopped: 0 of 3 takes are there."
    assert len(stage.view(two)["groups"][0]["takes"]) == 3 and not stage.view(one)["map"]
    files = len(list(stage.folder.iterdir()))
    stage.close("b")
    assert len(list(stage.folder.iterdir())) == files - 3 and not stage.tab("b").groups


def test_faults_are_one_line_above_the_takes(stage):
    """Catches a tab that stays busy after an error, and one that loses what was made before it."""
    tab = stage.tab("a")
    list(stage.make(tab, Wish(" ", merge_weight=0.5)))
    assert tab.status["wrong"] and tab.status["text"] == "the prompt is ' ': every prompt needs text"
    stage.player.fails = OSError("takes/x.wav cannot be written: there is no space left")
    list(stage.make(tab, WISH))
    assert tab.status["wrong"] and not tab.status["busy"] and "no space left" in tab.status["text"]
    assert [len(group["takes"]) for group in stage.view(tab)["groups"]] == [1]
    stage.player.fails = None
    made = stage.view(tab)["groups"][0]["takes"][0]
    with largest_file(100):
        _, status = stage.keep(tab, made["id"])
    assert status["wrong"] and "cannot be written" in status["text"] and not stage.kept
    _, status = stage.keep(tab, "gone")
    assert "this take is gone" in status["text"]


def test_what_was_kept_is_there_when_served_again(stage):
    tab = stage.tab("a")
    list(stage.make(tab, WISH))
    for _ in range(2):  # a second click
        stage.keep(tab, stage.view(tab)["groups"][0]["takes"][1]["id"])
    again = Stage(Scripted(), stage.folder, stage.output)
    view = again.view(again.tab("new"))
    assert [shown["number"] for shown in view["kept"]] == [2] and view["kept"][0]["kept"]
    assert Path(view["kept"][0]["url"].removeprefix("gradio_api/file=")).is_file()
    list(again.like(again.tab("new"), view["kept"][0]["id"], 2))
    assert len(again.view(again.tab("new"))["groups"][0]["takes"]) == 2


def test_the_page_is_served_to_itself_alone(stage, monkeypatch, tmp_path):
    """Catches another host's name, uploads, and files beside the takes."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    launch, served = gradio.Blocks.launch, []

    def launched(app, server_port, **options):
        served.append((app, launch(app, prevent_thread_lock=True, quiet=True, **options)))

    monkeypatch.setattr(gradio.Blocks, "launch", launched)
    kept_one = write_take(stage.output, take(), tone(440))
    (tmp_path / "secret.txt").write_text("secret")
    serve(Scripted(), stage.output)
    [(app, (_, url, _))] = served
    try:
        assert b"piano" in urlopen(url, timeout=10).read()
        assert urlopen(f"{url}gradio_api/file={kept_one}", timeout=10).read()[:4] == b"RIFF"
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{url}gradio_api/file={tmp_path / 'secret.txt'}", timeout=10)
        require_guarded(int(url.rstrip("/").rpartition(":")[2]))
    finally:
        app.close()


def test_without_gradio_it_says_what_to_install(stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"\.\[play\]"):
        page_module.build_page(stage)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["nano"] * 4, "4 models: name one"),
        (["nano", "--port", "0"], "--port"),
        (["nano", "--encoder", "/nowhere"], "no embedder at /nowhere"),
    ],
)
def test_commands_that_cannot_be_run(words, message, tmp_path, monkeypatch, capsys):
    from diverse_cfg.cli import main

    monkeypatch.chdir(tmp_path)
    try:
        assert main(["play", *words]) == 2
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium, by Playwright."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with driver.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install it, or run `playwright install chromium`")
        arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@contextmanager
def served_at(folder, port):
    """The command itself, on two students of nano."""
    models = [str(folder / name) for name in ("quality", "diversity")]
    words = ["play", *models, "--output", "kept", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "diverse_cfg", *words]
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "log.txt").read_text()
            time.sleep(0.25)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    save_students(folder)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with served_at(folder, port) as process:
        yield SimpleNamespace(folder=folder, port=port, process=process)


class Musician:
    """Somebody at the page."""

    def __init__(self, browser, site, width=1400, height=1000):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(180_000)
        self.asked, self.errors = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.open(site)

    def open(self, site):
        self.page.goto(f"http://127.0.0.1:{site.port}/")
        self.page.wait_for_function("document.querySelector('.stage .status span')?.textContent == 'Ready.'")

    def sets(self, label, value):
        box = self.page.locator(f'input[aria-label="number input for {label}"]')
        box.fill(str(value))
        box.press("Tab")

    def makes(self, prompt=None, takes=2):
        if prompt is not None:
            self.page.get_by_label("Prompt").fill(prompt)
        self.sets("Takes", takes)
        self.page.get_by_role("button", name="Make takes").click()

    def waits(self, cards):
        self.page.wait_for_function(
            f"document.querySelectorAll('.group .card').length == {cards} && !document.querySelector('.stage.busy')"
        )

    def hears(self):
        """Whether sound moves on."""
        self.page.wait_for_function("document.querySelector('audio').currentTime > 0.1")
        return True

    @property
    def status(self):
        return self.page.inner_text(".stage .status span")


@pytest.fixture
def musician(browser, site):
    somebody = Musician(browser, site)
    yield somebody
    hosts = {url.split("/")[2].split(":")[0] for url in somebody.asked if url.startswith(("http", "ws"))}
    errors = somebody.errors
    somebody.page.close()
    assert hosts <= {"127.0.0.1"}, "the page asks another host"
    assert not errors


@pytest.mark.slow
def test_type_slide_and_hear(musician, site):
    page = musician.page
    musician.sets("Variety λ", 1)
    musician.makes("a solo on a marimba", 3)
    musician.waits(3)
    assert page.inner_text(".group h3") == "λ = 1: “a solo on a marimba”"
    varied = float(page.inner_text(".group .note").split()[2])
    page.locator(".card .play").nth(1).click()
    assert musician.hears()
    assert page.locator(".card.playing").get_attribute("aria-label") == "take 2, seed 0, λ = 1"
    link = page.locator(".card a").nth(1).get_attribute("href")
    path = site.folder / "downloaded.wav"
    path.write_bytes(urlopen(f"http://127.0.0.1:{site.port}/{link}", timeout=30).read())
    with soundfile.SoundFile(path) as file:
        told = json.loads(file.comment)
    assert (told["seed"], told["take"], told["merge_weight"]) == (0, 2, 1.0)
    musician.sets("Variety λ", 0)
    musician.makes(takes=3)
    page.wait_for_selector("details")
    musician.waits(3)
    assert float(page.inner_text(".group .note").split()[2]) < varied
    assert page.locator(".dot").count() == 6
    page.locator(".dot.earlier").nth(1).hover()
    page.wait_for_selector(".dot.earlier.playing")


@pytest.mark.slow
def test_extend_compare_keep_and_come_back(musician, site):
    page = musician.page
    musician.makes("piano melody", 2)
    musician.waits(2)
    page.get_by_role("button", name="extend").first.click()
    musician.waits(3)
    assert page.locator(".card .time").all_inner_texts()[:3] == ["0:03", "0:06", "0:03"]
    page.get_by_role("button", name="compare with the guided base").click()
    musician.waits(5)
    rows = [text.split(", ")[1] for text in page.locator(".group .note").all_inner_texts()]
    assert rows == ["156 decoder rows", "312 decoder rows"]
    page.locator(".group .keep").nth(1).click()
    page.wait_for_selector(".keep:disabled")
    assert len(list((site.folder / "kept").glob("*.wav"))) == 1
    musician.open(site)
    assert page.locator(".side .card .time").all_inner_texts() == ["0:06"]
    page.locator(".side .play").click()
    assert musician.hears()
    musician.sets("Takes", 2)
    page.get_by_role("button", name="similar").click()
    musician.waits(2)


@pytest.mark.slow
def test_cancel_and_keys(musician):
    page = musician.page
    musician.sets("Seconds", 10)
    musician.makes("piano melody", 16)
    page.wait_for_function("/of 16 takes, about/.test(document.querySelector('.stage .status').textContent)")
    page.evaluate("document.querySelector('.stage .stop').click()")
    page.wait_for_selector(".stage:not(.busy)")
    assert "Stopped: " in musician.status
    musician.sets("Seconds", 1)
    musician.makes("piano melody", 2)
    page.wait_for_function("document.querySelectorAll('.group .card').length == 2")
    page.wait_for_selector(".stage:not(.busy)")
    page.locator(".card").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    assert musician.hears()
    assert page.locator(".card.playing").get_attribute("aria-label").startswith("take 2")


@pytest.mark.slow
def test_prompts_of_all_kinds(musician):
    page = musician.page
    musician.makes("piano " * 834)
    page.wait_for_selector(".status.wrong")
    assert "835 tokens, the text encoder takes 512: shorten it" in musician.status
    musician.makes("<script>window.bad = 1</script><img src=x onerror='window.bad = 2'> piano")
    musician.waits(2)
    assert "<script>window.bad = 1</script>" in page.inner_text(".group h3")
    assert page.evaluate("window.bad") is None


@pytest.mark.slow
def test_two_tabs_and_a_phone(musician, browser, site):
    """Catches tabs that disturb each other, and a page that is wider than a phone."""
    other = Musician(browser, site, 390, 844)
    musician.sets("Variety λ", 0)
    other.sets("Variety λ", 1)
    for somebody in (musician, other):
        somebody.makes("piano melody", 4)
    for somebody, weight in ((musician, 0), (other, 1)):
        somebody.waits(4)
        assert somebody.page.inner_text(".group h3").startswith(f"λ = {weight}")
    assert other.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not other.errors
    other.page.close()


@pytest.mark.slow
def test_a_killed_server_is_noticed_and_comes_back(musician, site):
    """The last test of the module: what was kept survives, and the page says that nobody answers."""
    page = musician.page
    musician.makes("piano melody", 1)
    musician.waits(1)
    page.locator(".group .keep").first.click()
    page.wait_for_selector(".keep:disabled")
    kept = len(list((site.folder / "kept").glob("*.wav")))
    site.process.kill()
    site.process.wait()
    page.get_by_role("button", name="Make takes").click()
    page.wait_for_function("/connection|answer/i.test(document.body.innerText)")
    with served_at(site.folder, site.port):
        musician.open(site)
        assert page.locator(".side .card").count() == kept
