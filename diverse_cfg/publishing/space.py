"""The page of `diverse-cfg play` as a Space of the Hub: what it consists of, and its upload."""

import json
import os
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import yaml

from diverse_cfg.cards import CARD_FILE
from diverse_cfg.publishing.plan import PlannedFile, UploadPlan, require_repo_id
from diverse_cfg.publishing.upload import Published, upload
from diverse_cfg.untrusted import render

_APP = '''"""Written by `diverse-cfg publish --space`: the page of `diverse-cfg play`."""

import importlib
import subprocess
import sys
from pathlib import Path

# A wheel beside this file is installed first; what it needs is in requirements.txt.
if wheels := [str(path) for path in Path(__file__).parent.glob("diverse_cfg-*.whl")]:
    options = ["--quiet", "--no-index", "--no-deps", "--ignore-installed"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    importlib.invalidate_caches()

from diverse_cfg.playing.page import build_space

demo, options = build_space({models}, base={base})

if __name__ == "__main__":
    demo.launch(**options)
'''


def plan_space(
    space_id: str,
    models: Sequence[str],
    *,
    base: str | None = None,
    private: bool = True,
    license: str | None = None,
    wheel: str | os.PathLike | None = None,
) -> UploadPlan:
    """What a Space with the page of these models consists of; needs no network.

    Args:
        space_id: "user/name" of the Space.
        models: Hub ids: one model, or a quality and a diversity student, between which λ moves.
        base: Hub id of their base, for guided clips beside theirs.
        private: whether the Space is.
        license: of the models.
        wheel: of this package, put beside the page; without one it is installed from PyPI in this version.

    Raises:
        ValueError: a name that is no Hub id, or a file that is no wheel of this package.
    """
    for name in (space_id, *models, *([base] if base else [])):
        require_repo_id(name)
    files = []
    gradio = f"gradio=={version('gradio')}"
    if wheel is None:
        needed = [f"diverse-cfg[play]=={version('diverse-cfg')}"]
    else:
        wheel = Path(wheel)
        if not wheel.is_file() or not wheel.name.startswith("diverse_cfg-") or wheel.suffix != ".whl":
            raise ValueError(f"{wheel} is no wheel of diverse-cfg: build one with `make build`, in dist/")
        # A Space installs requirements.txt before its other files are there, so that this names no file.
        needed = [line for line in requires("diverse-cfg") or [] if "extra ==" not in line]
        files.append(PlannedFile(wheel.name, wheel))
    metadata: dict[str, Any] = {
        "title": space_id.split("/")[1],
        "emoji": "🎹",
        "colorFrom": "blue",
        "colorTo": "purple",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "app_file": "app.py",
        "models": [*models, *([base] if base else [])],
        "tags": ["text-to-audio", "music", "musicgen", "diverse-cfg"],
        "pinned": False,
    }
    metadata |= {"license": license} if license else {}
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    text = render("space.md.jinja", {"models": models, "name": metadata["title"]})
    app = _APP.format(models=json.dumps(list(models)), base=json.dumps(base) if base else "None")
    texts = {
        CARD_FILE: f"---\n{front}---\n\n{text}",
        "app.py": app,
        "requirements.txt": "\n".join([*needed, gradio, ""]),
    }
    files = [*(PlannedFile(name, content.encode()) for name, content in texts.items()), *files]
    return UploadPlan(Path(space_id), space_id, private, tuple(files), repo_type="space")


def publish_space(
    space_id: str,
    models: Sequence[str],
    *,
    dry_run: bool = True,
    update: bool = False,
    card: Any = "refuse",
    token: str | None = None,
    endpoint: str | None = None,
    **how: Any,
) -> UploadPlan | Published:
    """Plan a Space and, unless it is a dry run, upload it in one commit; see `plan_space` and `publish`."""
    plan = plan_space(space_id, models, **how)
    return plan if dry_run else upload(plan, update=update, card=card, token=token, endpoint=endpoint)
