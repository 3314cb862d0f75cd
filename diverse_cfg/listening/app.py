"""The listening test as a small local web page (gradio), for quick votes of a few people.

A listener enters a name and gets their own order of the trials; who comes back goes on where they stopped.
The page knows neither the systems nor the key.
"""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diverse_cfg.listening.doorkeeper import Doorkeeper
from diverse_cfg.listening.study import QUESTIONS, Trial, Vote, Votes
from diverse_cfg.untrusted import markdown

_CHOICES = (("left", "◀ left"), ("same", "no difference"), ("right", "right ▶"))


@dataclass(frozen=True)
class _View:
    """What is on the page.

    Args:
        trial: the comparison, None when all are done.
        text: heading, question and prompt, or thanks, in Markdown.
        left, right: paths of the clips.
    """

    trial: Trial | None
    text: str
    left: tuple[str, ...] = ()
    right: tuple[str, ...] = ()


def _view(votes: Votes, listener: str) -> _View:
    """The next trial of a listener.

    Raises:
        ValueError: no name.
    """
    listener = listener.strip()
    if not listener:
        raise ValueError("enter a name first: any name, so that your votes count once")
    remaining, total = votes.remaining(listener), len(votes.trials)
    if not remaining:
        return _View(None, f"### Thank you, {markdown(listener)}\nAll {total} comparisons are done.")
    trial = remaining[0]
    text = (
        f"### {total - len(remaining) + 1} of {total}\n**{QUESTIONS[trial.kind]}**\n\nBoth sides were made "
        f"for: “{markdown(trial.prompt)}”"
    )
    folder = votes.folder.resolve()
    sides = [tuple(str(folder / file) for file in files) for files in (trial.left, trial.right)]
    return _View(trial, text, *sides)


def _build_app(folder: str | os.PathLike) -> Any:
    """The page as a `gradio.Blocks`.

    Raises:
        FileNotFoundError: the folder is no study.
        ImportError: gradio is not installed.
    """
    votes = Votes(folder)
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the listening page needs gradio: in a clone, pip install '.[listen]'") from error

    def show(listener: str) -> list[Any]:
        try:
            now = _view(votes, listener)
        except ValueError as error:
            raise gradio.Error(str(error)) from None
        clips = [clip for files in (now.left, now.right) for clip in (*files, None, None)[:2]]
        players = [gradio.update(value=clip, visible=clip is not None) for clip in clips]
        buttons = [gradio.update(visible=now.trial is not None) for _ in _CHOICES]
        return [now.trial.id if now.trial else "", now.text, *players, *buttons]

    def vote(listener: str, trial: str, answer: str) -> list[Any]:
        try:
            votes.add(Vote(trial, listener.strip(), answer))
        except ValueError as error:  # a second click, or a second window
            gradio.Warning(html.escape(str(error)))
        return show(listener)

    with gradio.Blocks(title="Listening test", analytics_enabled=False) as app:
        gradio.Markdown(
            "## Listening test\nPlease use headphones. Your name only keeps your votes apart from others'."
        )
        with gradio.Row():
            listener = gradio.Textbox(label="Name", max_lines=1)
            start = gradio.Button("Start or go on", variant="primary")
        trial = gradio.State("")
        text = gradio.Markdown()
        players = []
        with gradio.Row():
            for side in ("left", "right"):
                with gradio.Column():
                    players += [
                        gradio.Audio(label=f"{side} {number}", interactive=False, visible=False)
                        for number in (1, 2)
                    ]
        with gradio.Row():
            buttons = [gradio.Button(label, visible=False) for _, label in _CHOICES]
        outputs = [trial, text, *players, *buttons]
        start.click(show, listener, outputs)
        listener.submit(show, listener, outputs)
        for button, (answer, _) in zip(buttons, _CHOICES, strict=True):
            button.click(
                lambda who, which, answer=answer: vote(who, which, answer), [listener, trial], outputs
            )
    return app


def serve(
    folder: str | os.PathLike, *, host: str = "127.0.0.1", port: int = 7860, names: Sequence[str] = ()
) -> None:
    """Serve the page until it is interrupted; only clips of the study are readable, and nothing is shared.

    Args:
        folder: of the study.
        host: address to listen at; "0.0.0.0" lets others in.
        port: of that address.
        names: host names that the page answers to, besides this machine's own and addresses.
    """
    app = _build_app(folder)
    app.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,  # its web server would stand before ours
        max_file_size=0,
        allowed_paths=[str(Path(folder).resolve() / "audio")],
        app_kwargs={"middleware": [(Doorkeeper, (), {"host": host, "names": names})]},
    )
