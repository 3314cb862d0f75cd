"""Publish a model folder on the Hugging Face Hub: checked first, private by default, in one commit, never
by accident.

`plan` looks at the folder and decides what would be uploaded, without a network; `upload` talks to the Hub.
`publish` is both, and by default stops after the plan.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from diverse_cfg.cards import CURVES_FILE, METRICS_FILE, SAMPLES_FILE
from diverse_cfg.merging import merge_checkpoints
from diverse_cfg.policies.audiocraft.folders import is_audiocraft, read_audiocraft, write_transformers
from diverse_cfg.publishing.evidence import add_results, add_samples
from diverse_cfg.publishing.plan import PlannedFile, UploadPlan, check_loads, plan_upload
from diverse_cfg.publishing.space import plan_space, publish_space
from diverse_cfg.publishing.upload import Published, upload

__all__ = [
    "PlannedFile",
    "Published",
    "UploadPlan",
    "add_results",
    "add_samples",
    "check_loads",
    "plan_space",
    "plan_upload",
    "publish",
    "publish_space",
    "upload",
]


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = True,
    merged: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    samples: Sequence[str] = (),
    space: str | None = None,
    results: tuple[str | os.PathLike, str] | None = None,
    update: bool = False,
    card: Literal["refuse", "keep", "overwrite"] = "refuse",
    check: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
) -> UploadPlan | Published:
    """Check a student, adapter or merge, and upload it.

    Args:
        folder: the model folder; AudioCraft's is converted.
        repo_id: "user/name" on the Hub.
        private: whether the repository is private. An existing one must be what is asked for.
        dry_run: only say what would be uploaded; nothing is sent, no token is needed.
        merged: for an adapter, publish the full model that it makes of its base: the form that plays
            everywhere.
        base_model: Hub id of the base, where the folder names a place on this machine.
        license: licence of the weights, where the base's is not known here.
        tags: more tags for the card.
        samples: prompts to make a clip of each for the card; they are written into the folder's `samples/`.
        space: Hub id of the Space that plays it, which the card links; `publish_space` makes it.
        results: evaluation folder and the name of this model's row in it, for the card's numbers.
        update: allow a repository that has files already; files that we do not write are left alone.
        card: what to do about another README.md in that repository: "refuse", "keep" it or "overwrite" it.
        check: load the model and generate a few frames before uploading.
        token: Hub token; by default the one that is logged in (HF_TOKEN, `hf auth login`).
        endpoint: another Hub than the public one.

    Returns:
        The plan of a dry run; otherwise where it was published.

    Raises:
        ValueError: the folder is not fit to be published; nothing was sent.
        FileExistsError: the repository, or another card in it, is there already.
        PermissionError, ConnectionError, OSError: the Hub said no, or could not be reached; run it again to
        go on.
    """
    with tempfile.TemporaryDirectory(prefix="diverse-cfg-publish-") as temporary:
        folder, name = Path(folder), Path(folder).resolve().name
        if is_audiocraft(folder):  # what is published, and played by everybody, is the folder that it makes
            stored, source = read_audiocraft(folder), folder
            folder = Path(temporary) / "converted" / name
            write_transformers(stored, folder, like=source)
        if results is not None:
            add_results(folder, *results)
        if samples:
            add_samples(folder, samples)
        if merged:
            if not (folder / "adapter_config.json").is_file():
                raise ValueError(f"{folder} is a full model already: leave out merged=True (--merged)")
            full = merge_checkpoints([folder], None, Path(temporary) / "merged" / name)
            _take_along(folder, full)
            folder = full
        plan = plan_upload(
            folder, repo_id, private=private, base_model=base_model, license=license, tags=tags, space=space
        )
        if check:
            check_loads(folder)
        _ = plan.num_bytes  # sizes are looked up while temporary folders are there
        return plan if dry_run else upload(plan, update=update, card=card, token=token, endpoint=endpoint)


def _take_along(folder: Path, full: Path) -> None:
    """What was measured and heard of an adapter holds for the full model that it makes."""
    for name in (METRICS_FILE, CURVES_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, full / name)
    samples = Path(SAMPLES_FILE).parent
    if (folder / samples).is_dir():
        shutil.copytree(folder / samples, full / samples, symlinks=True)  # the plan says what may be a link
