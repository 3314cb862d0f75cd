"""The site: every page has its place, what it quotes and links is there, its code runs, and it builds strictly."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
HOOK = runpy.run_path(str(ROOT / "docs" / "pages.py"))
PAGES = list(HOOK["pages"](NAV))
OWN = sorted((ROOT / "docs").glob("*.md"))
GENERATED = {"docs/commands.md", "docs/python.md"}
QUESTIONS = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")


def test_every_page_has_a_place():
    """Fault: a page that is written and that no reader finds."""
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *OWN]
    for folder in (
        "recipes",
        "recipes/nano",
        "recipes/nano/results/experiment",
        "recipes/prompts",
        "benchmarks",
        "benchmarks/results",
        "model_cards",
    ):
        written += (ROOT / folder).glob("*.md")
    assert {str(path.relative_to(ROOT)) for path in written} | GENERATED == {*PAGES}
    assert len(PAGES) == len({*PAGES})


def test_what_people_look_for_is_two_clicks_away():
    """One click opens the page of questions, the next goes to one of its headings."""
    assert {"Questions": "docs/questions.md"} in NAV
    headings = re.findall(r"^## (.+)$", QUESTIONS, flags=re.MULTILINE)
    assert {"What is θ0?", "How do I choose β?", "My own reward", "Out of memory", "Resume", "Publish"} <= {
        *headings
    }


def source():
    """All Python of the package, adjacent strings joined and values left out as `…`."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "diverse_cfg").rglob("*.py"))
    text = re.sub(r'"\s*\n\s*(?:rf|fr|f|r)?"', "", text)
    return re.sub(r"\{[^{}\n]*\}|%d|%s", "…", text)


def test_what_is_quoted_is_said():
    """Fault: a page that explains an error which nobody gets any more."""
    code = source()
    text = re.sub(r"```.*?```|`[^`]*`", "`", QUESTIONS, flags=re.DOTALL).replace("\n", " ")
    symptoms = ("Louder", "Silence", "Noise")
    quoted = [words for words in re.findall(r"\*([^*]+)\*", text) if not words.startswith(symptoms)]
    assert len(quoted) >= 8
    assert [words for words in quoted if words not in code] == []


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(((?!http)[^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_paper_of_the_code_is_listed_and_every_row_is_true():
    """Fault: a paper that the code names and the page does not, or a row whose file does not name the paper."""
    number = re.compile(r"(?:\b|arXiv )(\d{4}\.\d{5}|(?<=arXiv )\d{4}\.\d{4})\b")
    files = (ROOT / "diverse_cfg").rglob("*.py")
    named = {
        str(path.relative_to(ROOT / "diverse_cfg")): {*number.findall(path.read_text("utf-8"))}
        for path in files
    }
    listed = re.compile(r"arxiv\.org/abs/([\d.]+)")
    assert {*listed.findall(PAPERS)} == set().union(*named.values())
    rows = [row for row in PAPERS.splitlines() if row.startswith("| [")]
    for row in rows:
        for file in re.findall(r"`([\w/]+\.py)`", row):
            assert named[file] & {*listed.findall(row)}, (file, row)
    for file in re.findall(r"`([\w/]+\.py)`", PAPERS):
        assert (ROOT / "diverse_cfg" / file).is_file(), file


def test_the_reference_has_every_command_and_every_name():
    import diverse_cfg
    from diverse_cfg.cli import COMMANDS

    objects = re.findall(r"^::: (\S+)\.(\w+)$", HOOK["python"](), flags=re.MULTILINE)
    assert {name for _, name in objects} == {*diverse_cfg.__all__} - {"__version__"}
    for module, name in objects:
        path = ROOT / module.replace(".", "/")
        path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        defined = path.read_text(encoding="utf-8")
        assert re.search(rf"^(?:class|def) {name}\b", defined, flags=re.MULTILINE), (module, name)
    assert COMMANDS


@pytest.mark.slow
def test_the_code_of_the_questions_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", QUESTIONS, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "calm").is_dir()


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path):
    """Fault: a link, an anchor or a picture that leads nowhere once the pages are a site."""
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for page, words in {
        "docs/commands": "--accelerate_config",
        "docs/python": "load_policy",
        "": "Diversity",
    }.items():
        assert words in (tmp_path / "site" / page / "index.html").read_text(encoding="utf-8")
