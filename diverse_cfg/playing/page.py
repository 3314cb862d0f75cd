"""The page itself (gradio): prompt and sliders on the left, the takes, their map and what was kept on the right."""

import html
import importlib.util
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diverse_cfg.atomic import alone
from diverse_cfg.listening.doorkeeper import Doorkeeper
from diverse_cfg.playing.player import Cost, Player, Progress, Wish
from diverse_cfg.playing.takes import Take, keep, kept, places, write_take
from diverse_cfg.untrusted import plain

_HERE = Path(__file__).parent
_EVERY = 0.12  # seconds between two pictures of the progress
_MOST_GROUPS, _MOST_TAKES = 12, 16
_ERRORS = (ValueError, OSError, FloatingPointError)
_IDEAS = (
    "piano melody",
    "a solo on a marimba",
    "a slow tune in D minor on a trumpet",
    "an organ plays a melody",
)


_View = tuple[dict[str, Any] | None, dict[str, Any]]
"""What is on the stage, None where that is as before, and what stands above it."""


@dataclass
class _Group:
    """Takes that were made by one click."""

    id: int
    title: str
    wish: Wish
    comparable: bool = False  # whether the base can play it with guidance
    guided: bool = False
    batch: int = 0  # the group that it is shown with; by default its own
    cost: Cost | None = None
    takes: list[Take] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.batch = self.batch or self.id


@dataclass
class _Tab:
    """What one page shows."""

    groups: list[_Group] = field(default_factory=list)
    clicks: int = 0
    told: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    status: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.say("Ready.", None)

    def next(self) -> int:
        """Number of the next group."""
        self.clicks += 1
        return self.clicks

    def say(self, text: str, done: float | None, wrong: bool = False) -> None:
        """What stands above the takes; `done` of the work, None where nothing is to be done."""
        self.told += 1  # no two are the same, so that the page shows every one
        fraction, busy = round(done or 0, 3), done is not None
        self.status = {"text": text, "fraction": fraction, "busy": busy, "wrong": wrong, "number": self.told}


class Stage:
    """The takes of all tabs.

    Args:
        player: makes them.
        folder: where the others lie as long as the page is served.
        output: where kept ones go; None where nothing is kept.
    """

    def __init__(self, player: Player, folder: str | Path, output: str | Path | None) -> None:
        self.player = player
        self.folder = Path(folder)
        self.output = None if output is None else Path(output).resolve()
        self.tabs: dict[str, _Tab] = {}
        self.kept = [] if self.output is None else kept(self.output)

    def tab(self, name: str | None) -> _Tab:
        """The tab of a session."""
        return self.tabs.setdefault(name or "", _Tab())

    def close(self, name: str | None) -> None:
        """Its page was closed or loaded anew: nobody waits for its takes."""
        if tab := self.tabs.pop(name or "", None):
            tab.cancelled.set()
            for take in (take for group in tab.groups for take in group.takes):
                (self.folder / take.file).unlink(missing_ok=True)

    def find(self, tab: _Tab, id: str) -> Take:
        """A take of a tab, or a kept one."""
        for take in [*(take for group in tab.groups for take in group.takes), *self.kept]:
            if take.id == id:
                return take
        raise ValueError("this take is gone: the page was loaded anew")

    def view(self, tab: _Tab) -> dict[str, Any]:
        """What the page shows of a tab."""
        known = {take.id for take in self.kept}
        current = tab.groups[-1].batch if tab.groups else None
        shown = [take for group in tab.groups for take in group.takes]
        at = places([*shown, *(take for take in self.kept if take not in shown)], self.player.embedder.name)
        whose = {take.id: group.id for group in tab.groups for take in group.takes}
        groups = [
            {
                "id": group.id,
                "batch": group.batch,
                "title": f"{group.title}: “{group.wish.prompt}”",
                "note": self._note(group),
                "guided": group.guided,
                "comparable": bool(self.player.base and group.comparable and group.cost)
                and not any(other.guided and other.batch == group.id for other in tab.groups),
                "takes": [self._shown(take, known) for take in group.takes],
            }
            for group in tab.groups
        ]
        return {
            "groups": groups,
            "batch": current,
            "kept": [self._shown(take, known) for take in self.kept],
            "keeps": None if self.output is None else f"{self.output.name}/",
            "map": [{"id": id, "x": x, "y": y, "group": whose.get(id)} for id, (x, y) in at.items()],
            "encoder": self.player.embedder.name,
        }

    def _note(self, group: _Group) -> str:
        parts = []
        if (distance := self.player.distance(group.takes)) is not None:
            parts.append(f"mean distance {distance:.2f}")
        if cost := group.cost:
            parts.append(f"sampled in {cost.sampling:.1f} s, {cost.rows:,} decoder rows")
        return " · ".join(parts)

    def _shown(self, take: Take, known: set[str]) -> dict[str, Any]:
        inside = take.id in known
        folder = (inside and self.output) or self.folder
        label = f"Take {take.number + 1}" + (" +" if "extended" in take.settings else "")
        return take.looks | {
            "id": take.id,
            "label": label,
            "number": take.number + 1,
            "seed": take.seed,
            "model": take.model,
            "prompt": take.prompt,
            "seconds": take.seconds,
            "volume": take.volume,
            "file": take.file,
            "kept": inside,
            "extendable": not take.model.startswith("guided base"),
            "url": f"gradio_api/file={quote(str(folder / take.file))}",
        }

    def make(self, tab: _Tab, wish: Wish) -> Iterator[_View]:
        """New takes; after each comes what the page shows."""
        yield from self._run(tab, wish, _Group(tab.next(), self.player.title(wish), wish, comparable=True))

    def like(self, tab: _Tab, id: str, num_takes: int) -> Iterator[_View]:
        """New takes that begin as one does."""
        take = self.find(tab, id)
        wish = self._wish(take, num_takes, take.seconds, random.randrange(10**6))
        group = _Group(tab.next(), f"{take.model}, like take {take.number + 1} of seed {take.seed}", wish)
        yield from self._run(tab, wish, group, like=take)

    def longer(self, tab: _Tab, id: str) -> Iterator[_View]:
        """A take and what comes after it, beside it."""
        take = self.find(tab, id)
        wish = self._wish(take, 1, self.player.usual, take.seed + len(take.codes[0]))
        group = next((group for group in tab.groups if take in group.takes), None)
        group = group or _Group(tab.next(), f"{take.model}, extended", wish)
        yield from self._run(tab, wish, group, longer=take)

    def guided(self, tab: _Tab, number: int) -> Iterator[_View]:
        """The same prompt and seeds, by the base with guidance, beside a group."""
        group = next(group for group in tab.groups if group.id == number)
        title = f"guided base, γ = {self.player.guidance_scale:g}"
        beside = _Group(tab.next(), title, group.wish, guided=True, batch=group.batch)
        yield from self._run(tab, group.wish, beside, guided=True)

    def _wish(self, take: Take, num_takes: int, seconds: float, seed: int) -> Wish:
        """What a take was made of, once more."""
        names = ("temperature", "merge_weight", "guidance_scale")
        own = {name: take.settings[name] for name in names if name in take.settings}
        own["guidance_scale"] = take.settings.get("student_guidance", own.get("guidance_scale"))
        return Wish(take.prompt, num_takes, seconds, seed, **own)

    def _run(self, tab: _Tab, wish: Wish, group: _Group, **how: Any) -> Iterator[_View]:
        begun, shown, made, text, wrong = time.perf_counter(), 0.0, 0, "", False
        tab.cancelled, count, after = threading.Event(), wish.num_takes, how.get("longer")
        try:
            self.player.check(wish)
            if group not in tab.groups:
                tab.groups = [*tab.groups, group][-_MOST_GROUPS:]
            tab.say("Loading the base…" if group.guided else "Beginning…", 0.0)
            yield self.view(tab), tab.status
            for event in self.player.play(wish, cancelled=tab.cancelled, **how):
                if isinstance(event, Progress):
                    left = f"about {max(1, round(event.seconds_left))} s left"
                    tab.say(f"{made} of {count} takes, {left}", event.fraction)
                    if time.perf_counter() - shown > _EVERY:
                        shown = time.perf_counter()
                        yield None, tab.status
                elif isinstance(event, Cost):
                    group.cost = group.cost or event
                else:
                    take, waveform = event
                    write_take(self.folder, take, waveform)
                    group.takes.insert(group.takes.index(after) + 1 if after in group.takes else made, take)
                    made += 1
                    yield self.view(tab), tab.status
            text = f"{made} {'take' if made == 1 else 'takes'} in {time.perf_counter() - begun:.1f} s."
            text = text if made == count else f"Stopped: {made} of {count} takes are there."
        except _ERRORS as error:
            text, wrong = plain(" ".join(str(error).split())).replace("prompt 0", "the prompt"), True
        finally:
            tab.say(text, None, wrong)
        yield self.view(tab), tab.status

    def keep(self, tab: _Tab, id: str) -> _View:
        """Keep a take."""
        try:
            take = self.find(tab, id)
            if self.output is not None and take not in self.kept:
                keep(self.output, take, self.folder / take.file, self.player.model)
                self.kept.append(take)
        except _ERRORS as error:
            tab.say(plain(str(error)), None, True)
        return self.view(tab), tab.status


def build_page(stage: Stage) -> Any:
    """The page as a `gradio.Blocks`.

    Raises:
        ImportError: gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio: in a clone, pip install '.[play]'") from error
    player = stage.player

    def wish(
        prompt: str,
        weight: float,
        guidance: float,
        takes: float,
        seconds: float,
        seed: Any,
        temperature: float,
    ):
        moved = {"merge_weight": float(weight)} if player.moves else {}
        guided = {"guidance_scale": float(guidance)} if player.guided or player.told else {}
        return Wish(prompt, int(takes), float(seconds), int(seed or 0), float(temperature), **moved, **guided)

    def tab(request: gradio.Request) -> _Tab:
        return stage.tab(request.session_hash)

    def shown(views: Iterator[_View]) -> Iterator[Any]:
        for view, status in views:
            yield gradio.skip() if view is None else view, status

    with gradio.Blocks(title="diverse-cfg play", analytics_enabled=False, fill_width=True) as page:
        with gradio.Row():
            with gradio.Column(scale=0, min_width=320):
                gradio.Markdown(f"# {html.escape(' · '.join(player.names))}")
                prompt = gradio.Textbox(label="Prompt", lines=2, value=_IDEAS[0], max_length=10_000)
                gradio.Examples([[idea] for idea in _IDEAS], prompt, label="Ideas")
                merge_weight = gradio.Slider(
                    0, 1, 0.5, step=0.05, label="Variety λ", visible=player.moves,
                    info=f"0 is {player.names[0]}, 1 is {player.names[-1]}",
                )  # fmt: skip
                low, high = player.told or (1.0, 10.0)
                guidance = gradio.Slider(
                    low, high, min(max(player.guidance_scale, low), high), step=0.1, label="Guidance γ",
                    visible=bool(player.guided or player.told),
                    info="inside the weights: it costs nothing" if player.told else "at twice the cost",
                )  # fmt: skip
                with gradio.Row():
                    go = gradio.Button("Make takes", variant="primary", min_width=120)
                    surprise = gradio.Button("Surprise me", min_width=120)
                takes = gradio.Slider(1, _MOST_TAKES, 8, step=1, label="Takes")
                seconds = gradio.Slider(
                    1,
                    max(1, int(player.longest)),
                    min(player.usual, player.longest),
                    step=0.5,
                    label="Seconds",
                )
                seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)
                with gradio.Accordion("More", open=False):
                    temperature = gradio.Slider(0, 2, player.temperature, step=0.05, label="Temperature")
            with gradio.Column(scale=1, min_width=320):
                board = gradio.HTML(
                    {},
                    elem_id="stage",
                    html_template='<div class="stage"></div>',
                    js_on_load=f"(element => {{{(_HERE / 'stage.js').read_text(encoding='utf-8')}}})"
                    "(element.querySelector('.stage'))",
                    apply_default_css=False,
                )
                news = gradio.HTML(
                    {},
                    elem_id="news",
                    html_template="",
                    js_on_load="watch('value', () => dispatchEvent(new CustomEvent('told', { detail: props.value })))",
                )
        wanted = [prompt, merge_weight, guidance, takes, seconds, seed, temperature]
        slow = {
            "outputs": [board, news],
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        quick = {
            "outputs": [board, news],
            "show_progress": "hidden",
            "api_visibility": "private",
            "queue": False,
        }

        def make(request: gradio.Request, *values: Any) -> Iterator[Any]:
            yield from shown(stage.make(tab(request), wish(*values)))

        def like(takes: float, event: gradio.EventData, request: gradio.Request) -> Iterator[Any]:
            yield from shown(stage.like(tab(request), event.id, int(takes)))

        def longer(event: gradio.EventData, request: gradio.Request) -> Iterator[Any]:
            yield from shown(stage.longer(tab(request), event.id))

        def guided(event: gradio.EventData, request: gradio.Request) -> Iterator[Any]:
            yield from shown(stage.guided(tab(request), int(event.group)))

        def keep(event: gradio.EventData, request: gradio.Request) -> _View:
            return stage.keep(tab(request), event.id)

        def stop(request: gradio.Request) -> None:
            tab(request).cancelled.set()

        go.click(make, wanted, **slow)
        prompt.submit(make, wanted, **slow)
        surprise.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)").then(
            make, wanted, **slow
        )
        board.like(like, takes, **slow)
        board.longer(longer, None, **slow)
        board.guided(guided, None, **slow)
        board.keep(keep, None, **quick)
        board.stop(stop, None, None, queue=False, api_visibility="private")

        def show(request: gradio.Request) -> _View:
            return stage.view(tab(request)), tab(request).status

        def close(request: gradio.Request) -> None:
            stage.close(request.session_hash)

        page.queue(max_size=64)
        page.load(show, None, **quick)
        page.unload(close)
    return page


def serve(player: Player, output: str | Path, *, port: int = 7860, **launch: Any) -> None:
    """Serve the page on this machine alone, until it is interrupted; nothing is shared and nothing taken.

    Args:
        player: makes the takes.
        output: folder of kept takes, made if need be.
        port: of 127.0.0.1.
        launch: more for `gradio.Blocks.launch`.

    Raises:
        FileExistsError: another process serves this folder.
    """
    with tempfile.TemporaryDirectory(prefix="diverse-cfg-play-") as folder, alone(output) as output:
        page = build_page(Stage(player, folder, output))
        page.launch(
            **_launching([folder, str(output.resolve())]),
            server_name="127.0.0.1",
            server_port=port,
            app_kwargs={"middleware": [(Doorkeeper, (), {"host": "127.0.0.1", "names": ()})]},
            **launch,
        )


def build_space(models: Sequence[str], *, base: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The page for a Space of the Hub, where nothing is kept, and the options of its `launch`.

    On ZeroGPU hardware every wish gets a GPU, in a process of its own.

    Args:
        models: Hub ids, see `Player`.
        base: Hub id of the base.
    """
    folder = tempfile.mkdtemp(prefix="diverse-cfg-play-")
    player = Player(models, base=base)
    if importlib.util.find_spec("spaces") is not None:
        spaces, here = importlib.import_module("spaces"), player.play  # installed there, and only there

        @spaces.GPU
        def on_gpu(wish: Wish, how: dict[str, Any]) -> Iterator[Any]:
            yield from here(wish, **how)

        def play(wish: Wish, *, cancelled: threading.Event, **how: Any) -> Iterator[Any]:
            for event in on_gpu(wish, how):  # an event of threads does not reach the other process
                if cancelled.is_set():
                    return
                yield event

        player.play = play
    page = build_page(Stage(player, folder, None))
    page.player = player
    return page, _launching([folder])


def _launching(folders: Sequence[str]) -> dict[str, Any]:
    """How this page is launched: its looks, no uploads, nothing from elsewhere, files of `folders` alone."""
    import gradio

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {
        "share": False,
        "ssr_mode": False,  # its web server would stand before ours
        "max_file_size": 0,
        "allowed_paths": list(folders),
        "theme": gradio.themes.Default(primary_hue="blue", **fonts),
        "css": (_HERE / "stage.css").read_text(encoding="utf-8"),
        "footer_links": [],
    }
