"""Hostile strings through every template and every name that becomes a path: they stay text, and stay inside."""

import ast
import csv
import html.parser
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import yaml
from huggingface_hub import ModelCard

from diverse_cfg.cards import CardMetric, Sample, render_card, write_metrics, write_samples
from diverse_cfg.embeddings.recordings import AudioRecordings
from diverse_cfg.evaluation.protocol import SweepConfig
from diverse_cfg.evaluation.report import Picture, _draw, _to_page, _write_gallery
from diverse_cfg.evaluation.results import Results
from diverse_cfg.evaluation.signatures import HOLDS, Signature, _Evidence, to_markdown
from diverse_cfg.evaluation.systems import System, single
from diverse_cfg.listening.app import _view
from diverse_cfg.listening.study import TRIALS_FILE, Votes, load_trials
from diverse_cfg.listening.webmushra import export_study
from diverse_cfg.policies.files import _plan
from diverse_cfg.prompts import load_prompts
from diverse_cfg.provenance import Provenance, write_provenance
from diverse_cfg.untrusted import TOKEN, checked_name, frame_csv, inside, markdown, plain, slug
from tests.evaluation.test_figures import lerp, row

ROOT = Path(__file__).parent.parent
HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "`</code>` | a | b |",
    "[x](javascript:alert(1)) ![x](http://e/x.png) <http://e>",
    "two\n\n---\n# lines\n\n<script>",
    "\r\n```\n~~~",
    "~~~",
    "---",
    "1. one",
    "- one",
    "=1+1|' x'!A0 {{ 7 * 7 }} {% raw %} $\\frac{$ *a* _b_ \\",
    "<!-- written by \x1b[2J\x00 -->",
]
HOSTILE.append(" ".join(HOSTILE))
NAMES = [
    "../../../x",
    "/etc/x",
    "..",
    ".",
    "",
    ".hidden",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "\n",
    "x" * 300,
    7,
    None,
]


def structure(text):
    """What a reader of Markdown makes of a page, without its words."""
    MarkdownIt = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed").MarkdownIt
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found.append((token.type, token.content if token.type == "html_block" else ""))
        words = ("text", "text_special", "code_inline")
        found += [
            (child.type, child.content if "html" in child.type else str(child.attrs))
            for child in token.children or []
            if child.type not in words
        ]
    return found


class Tags(html.parser.HTMLParser):
    """Tags and names of attributes of a page, without its words."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))

    def handle_comment(self, data):
        self.found.append(("comment", data))


def card(folder, kind, text):
    """A card that says `text` wherever a file can say something."""
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "a.wav").write_bytes(b"RIFF")
    parent = dict.fromkeys(("name", "kind", "weight", "guidance_scale", "diversity_coef"), text)
    merge = {"dtype": text, "experts": [parent, parent]} if kind == "merge" else None
    facts = {"base_model": text, "merge": merge, "training": {text: text}, "versions": {text: text}}
    write_provenance(folder, Provenance(kind, **facts))
    (folder / "generation_config.json").write_text("{}")
    write_metrics(folder, [CardMetric(text, 1.0, 0.5, 1.5, text, text)], prompts=text, num_clips=text)
    write_samples(folder, [Sample("samples/a.wav", text, text)])
    return render_card(folder, license=text, tags=[text], datasets=[text])


@pytest.mark.parametrize("kind", ["student", "merge"])
def test_cards(tmp_path, kind, monkeypatch):
    """Fault: strings of a `generation_config.json` that broke out of the table as a raw script."""
    settings = {"guidance_scale": "words", "max_new_tokens": 20, "top_p": "words"}
    monkeypatch.setattr("diverse_cfg.cards._generation", lambda folder: settings)
    wanted = structure(card(tmp_path / "plain", kind, "words").split("\n---\n", 1)[1])
    for number, text in enumerate(HOSTILE):
        settings |= {"guidance_scale": text, "top_p": text}
        found = card(tmp_path / str(number) / "plain", kind, text)
        body = ModelCard(found).text
        assert structure(body) == wanted, text
        metadata = yaml.safe_load(found.split("\n---\n")[0].removeprefix("---"))
        assert (metadata["license"], metadata["tags"][-1]) == (text, text)
        assert metadata["widget"][0]["text"] == text
        assert "<script" not in re.sub(r"```python.*?\n```", "", body, flags=re.DOTALL)
        for block in re.findall(r"^```python\n(.*?)^```", body, flags=re.DOTALL | re.MULTILINE):
            ast.parse(block)


def evaluated(text, name="x"):
    """Results that say `text` wherever they can; a name is one line."""
    name = " ".join(plain(text).split()) or "x"
    rows = [row(f"{name} {index}", 0.4 + 0.1 * index, 0.6, spread=0.1, series=name) for index in (0, 1)]
    rows[0].flags.append(text)
    failed = row(f"{name} failed", 0.5, 0.5)
    failed.error, failed.cells, failed.metrics = text, {}, {}
    settings = {
        "seeds": [0],
        "num_generations": 2,
        "num_prompts": 12,
        "versions": {"torch": "2"},
        "machine": "x",
    }
    return Results([text] * 12, [*rows, failed, *lerp()], settings)


def page(folder, text):
    results = evaluated(text)
    files = {(r.system.name, p): ["audio/a.wav"] for r in results.usable for p in (0, 1)}
    pictures = [Picture("front.svg", text)]
    _write_gallery(results, files, folder, title=text, introduction=text, pictures=pictures)
    return Tags((folder / "index.html").read_text(encoding="utf-8")).found


def results_page(text):
    found = Signature(1, "title", (_Evidence(f"{text} is more", None, HOLDS),))
    config = SweepConfig(systems=[{"name": "x", "model": "x"}], output="x")
    return _to_page(evaluated(text), [Picture("front.svg", text)], config) + "\n" + to_markdown([found])


def test_pages_of_results(tmp_path):
    """The gallery (which is also the demo's page), and the page of numbers and findings."""
    tags, wanted = page(tmp_path / "plain", "words"), structure(results_page("words"))
    for number, text in enumerate(HOSTILE):
        assert page(tmp_path / str(number), text) == tags, text
        assert structure(results_page(text)) == wanted, text


def test_figures_and_their_numbers(tmp_path):
    """Fault: a name with two dollar signs is mathematics to matplotlib, and wrong mathematics stops it."""
    for number in (10, -1):
        _draw(evaluated(HOSTILE[number]), tmp_path / str(number))
        root = ElementTree.parse(tmp_path / str(number) / "front.svg").getroot()
        assert not [element.tag for element in root.iter() if element.tag.endswith(("script", "image"))]
    names = [line[0] for line in csv.reader((tmp_path / "10" / "front.csv").open(encoding="utf-8")) if line]
    assert any(name.startswith("'=1+1") for name in names)


def test_a_spreadsheet_computes_nothing():
    cells = ["=1+1", "+1+1", "-x", "@SUM(A1)", "\t=1", "-0.5", "+3", -0.5, None, "a,b", "−1", "base"]
    _, found = csv.reader(io.StringIO(frame_csv(pd.DataFrame([cells], dtype=object))))
    assert found[:5] == ["'=1+1", "'+1+1", "'-x", "'@SUM(A1)", "'\t=1"]
    assert found[5:] == ["-0.5", "+3", "-0.5", "", "a,b", "−1", "base"]
    assert "'=1" in Results(["p"], [row("=1", 0.1, 0.2)]).csv()


@pytest.fixture
def study(tmp_path):
    """A study of one trial; `write(**changes)` writes it anew."""

    def write(**changes):
        folder = tmp_path / "study"
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        for name in ("l", "r"):
            soundfile.write(folder / "audio" / f"{name}.wav", np.zeros(800), 8000)
        trial = {"id": "abc", "kind": "quality", "prompt": "words"}
        trial |= {"left": ["audio/l.wav"], "right": ["audio/r.wav"]}
        (folder / TRIALS_FILE).write_text(json.dumps([trial | changes]))
        return folder

    return write


def test_listening_pages(study, tmp_path):
    wanted = structure(_view(Votes(study()), "anna").text)
    for number, text in enumerate(HOSTILE):
        folder = study(prompt=text)
        assert structure(_view(Votes(folder), text).text) == wanted, text
        config = yaml.safe_load(export_study(folder, tmp_path / str(number)).read_text(encoding="utf-8"))
        assert Tags(config["pages"][1][1]["content"]).found == [("p",), ("p",)], text


@pytest.mark.parametrize("name", NAMES)
def test_names_that_become_paths(study, tmp_path, name):
    """Fault: `listen webmushra --test-id ../../../x` wrote beside its output, and lists of files led anywhere."""
    with pytest.raises(ValueError, match="becomes a file name"):
        checked_name(name, "a name")
    with pytest.raises(ValueError, match=r"the test id \(--test-id\) .* becomes a file name"):
        export_study(study(), tmp_path / "deep" / "output", name)
    assert not (tmp_path / "deep").exists()
    with pytest.raises(ValueError, match=r"trials\.json is not what .*becomes a file name"):
        load_trials(study(id=name))
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug(name)) and len(slug(name)) <= 60
    for clip in _plan([str(name)], 1, 0, 1.0, False, None):
        assert re.fullmatch(r"0000-00-[a-z0-9-]+\.wav", clip["file"]) and len(clip["file"]) < 60


@pytest.mark.parametrize(
    "name", ["pilot", "a", "diverse_cfg", "Versuch 2.b", "müller-λ=0.5", "a..b", "x" * 100]
)
def test_usual_names_stay(name, study, tmp_path):
    assert checked_name(name, "a name") == name
    assert export_study(study(), tmp_path / "output", name).name == f"{name}.yaml"


@pytest.mark.parametrize("name", ["../x.wav", "/etc/x.wav", "audio/../../x.wav", "", "a\0b", 7, None])
def test_lists_of_files_stay_in_their_folder(study, tmp_path, name):
    """Of a study, of a card's samples, and of generated clips that an embedder learns from."""
    clips = tmp_path / "clips"
    (clips / "samples").mkdir(parents=True)
    (clips / "generations.json").write_text(json.dumps({"clips": [{"file": name, "prompt": "x"}]}))
    (clips / "samples" / "samples.json").write_text(json.dumps([{"file": name, "prompt": "x"}]))
    write_provenance(clips, Provenance("student"))
    for message, read in (
        ("does not lie in", lambda: inside(tmp_path, name)),
        (r"trials\.json .*does not lie in", lambda: load_trials(study(left=[name]))),
        ("does not lie in", lambda: write_samples(tmp_path, [Sample(name, "x")])),
        ("does not lie in", lambda: AudioRecordings.from_folder(clips)),
        ("does not lie in", lambda: render_card(clips)),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    assert inside(tmp_path, "audio/a b.wav") == tmp_path / "audio" / "a b.wav"


def test_a_split_is_no_path(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("train", "test"):
        (tmp_path / "prompts" / f"{name}.txt").write_text("x")
    (tmp_path / "x.txt").write_text("secret")
    with pytest.raises(FileNotFoundError, match="named after the split"):
        load_prompts(tmp_path / "prompts", split="../x")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a\u202eb", "\ud800", "hf_" + "a" * 30])
def test_names_of_systems_can_be_shown(name):
    """An SVG with a control character is no XML; half a letter cannot be written at all."""
    for values in ({"name": name}, {"name": "x", "series": name}):
        with pytest.raises(ValueError, match="one line of letters"):
            System(replicates=single("x"), **values)


def test_text_is_shown_as_it_is():
    """What means nothing in Markdown is left alone."""
    for text in (
        "merge_λ 0.5",
        "base γ=3",
        "a-b",
        "90s rock & roll".replace("&", "and"),
        "naïve, “so”",
        "-0.5",
        "1.5",
    ):
        assert markdown(text) == text
    assert markdown("_a_ *b* a|b <i> #1") == r"\_a\_ \*b\* a\|b &lt;i&gt; \#1"
    assert plain("a\x1b[2J\u202eb\nc") == "a�[2J�b\nc"
    assert slug("../../etc: ünïcode  90s Rock") == "etc-n-code-90s-rock" and slug("…") == "clip"


def test_tokens_are_never_shown(capsys):
    """In the error line of a command, its warnings and its log."""
    import logging
    import warnings

    from diverse_cfg.cli import main
    from diverse_cfg.cli.command import Command

    token = "hf_" + "aB3" * 10

    def run(args):
        logging.getLogger("diverse_cfg.x").warning("log https://me:%s@huggingface.co", token)
        warnings.warn(f"warning {token}", stacklevel=1)
        raise ValueError(f"error\x1b[2J https://huggingface.co/x?token={token}")

    assert main(["x"], [Command("x", "x", lambda parser: None, run)]) == 2
    text = capsys.readouterr().err
    assert text.count("hf_…") == 3 and not TOKEN.search(text) and "\x1b" not in text


def test_pickles_are_loaded_as_weights_only():
    """A pickle may run code. (Pickle itself, `eval` and unsafe YAML are left to the linter.)"""
    calls = 0
    for path in (
        p for folder in ("diverse_cfg", "recipes", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("trust_remote_code") in (None, "False"), path
            assert options.get("allow_pickle") in (None, "False"), path
            if ast.unparse(node.func) == "torch.load":
                calls += 1
                assert options.get("weights_only") == "True", (path, node.lineno)
    assert calls
