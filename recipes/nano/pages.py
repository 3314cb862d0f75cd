"""Sections of Markdown pages that programs keep up to date."""

from pathlib import Path

from diverse_cfg.atomic import write_text


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end name -->`."""
    first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise ValueError(f"{page} has no section between {first.strip()} and {last}")
    write_text(page, before + first + text + "\n" + last + after)
