"""What would be published: which files, how large, with which card. Needs no network and changes nothing."""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diverse_cfg import cards
from diverse_cfg.merging import inspect_checkpoint
from diverse_cfg.merging.merge import RECIPE_FILE
from diverse_cfg.policies.checkpoints import base_name, require_named_base
from diverse_cfg.policies.families import PROCESSOR_FILES, family_of, load_generation_config
from diverse_cfg.policies.loading import load_policy, load_processor, require_processor
from diverse_cfg.policies.shift import SHIFT_FILE
from diverse_cfg.policies.stored import FullCheckpoint, locate
from diverse_cfg.provenance import PROVENANCE_FILE, read_provenance
from diverse_cfg.reading import read_json, reading
from diverse_cfg.untrusted import TOKEN

_ALWAYS = (
    "generation_config.json",
    *PROCESSOR_FILES,
    PROVENANCE_FILE,
    RECIPE_FILE,
    SHIFT_FILE,
    cards.METRICS_FILE,
    cards.CURVES_FILE,
    "samples/*",
)
_FULL = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# The last parts of `nano_path()`, in whichever environment a model was trained.
_NANO_BASE = ("assets", "nano", "base")


@dataclass(frozen=True)
class PlannedFile:
    """One file of the repository: where it goes, and its content (a file on disk, or bytes made for the
    upload)."""

    path_in_repo: str
    source: Path | bytes

    @property
    def content(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @cached_property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """How the Hub identifies large files."""
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class UploadPlan:
    """Everything that an upload would do, to be read before it is done."""

    folder: Path
    repo_id: str
    private: bool
    files: tuple[PlannedFile, ...]
    left_out: tuple[str, ...] = field(default=())
    repo_type: str = "model"
    """Or "space"."""

    @property
    def card(self) -> str:
        """The README.md that would be published."""
        [readme] = [file for file in self.files if file.path_in_repo == cards.CARD_FILE]
        return readme.content.decode()

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def describe(self) -> str:
        """The plan as text: repository, files with sizes, what stays here, and the card."""
        visibility = "private" if self.private else "PUBLIC"
        what = "" if self.repo_type == "model" else f"{self.repo_type} "
        size = _size(self.num_bytes)
        lines = [f"{self.folder} → {what}{self.repo_id} ({visibility}), {size} in one commit", ""]
        lines += [f"  {_size(file.size):>10}  {file.path_in_repo}" for file in self.files]
        if self.left_out:
            lines += ["", f"not uploaded: {', '.join(self.left_out)}"]
        return "\n".join([*lines, "", "--- card " + "-" * 60, self.card])


def plan_upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    space: str | None = None,
) -> UploadPlan:
    """Choose and check what goes into a repository; see `publish` for the arguments.

    Raises:
        ValueError: guidance is on, weights are missing, the base has no Hub id, the licence is unknown, a
            file holds a token… The message says what to do.
    """
    folder = Path(folder)
    require_repo_id(repo_id)
    provenance = read_provenance(folder)
    if provenance is None:
        raise ValueError(
            f"{folder} has no {PROVENANCE_FILE}: publish what `train` or `merge` wrote (a training "
            "checkpoint inside it is not complete)"
        )
    adapter = (folder / "adapter_config.json").is_file()
    _require_recorded_base(folder, cards.base_name(folder, provenance), base_model)
    if adapter and base_model is not None:
        _require_same_weights(folder, base_model)
    _require_unguided(folder, provenance.distilled)
    require_processor(folder)
    replaced = _with_public_base(folder, adapter, base_model)
    card = _card(folder, repo_id, base_model, license, tags, space)
    patterns = (*_ALWAYS, *(_ADAPTER if adapter else _FULL))
    chosen = sorted(
        {
            path
            for pattern in patterns
            for path in folder.glob(pattern)
            if path.is_file() and path.name[0] != "."
        }
    )
    files = [PlannedFile(cards.CARD_FILE, card.encode())]
    for path in chosen:
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of the folder: put the file itself there, if it "
                "is to be published"
            )
        files.append(PlannedFile(name, replaced.get(name, path)))
    for file in files:
        _require_no_secret(file)
    names = {file.path_in_repo for file in files}
    left_out = sorted(
        p.name for p in folder.iterdir() if p.name not in {name.split("/")[0] for name in names}
    )
    return UploadPlan(folder, repo_id, private, tuple(files), tuple(left_out))


def check_loads(folder: str | os.PathLike) -> None:
    """Load the model as a user would and let it play a few frames without guidance.

    Raises:
        ValueError: it does not load, its weights are damaged or those of its base, or what it plays is not finite.
    """
    try:
        report = inspect_checkpoint(folder)
        model = load_policy(folder)
        processor = load_processor(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} does not load, so it is not published: {error}") from error
    for fault, what in (("not_finite", "NaN or infinite values"), ("all_zero", "nothing but zeros")):
        if report[fault]:
            raise ValueError(
                f"{folder} has {what} in {report[fault][0]}, so it is not published: its training broke, or it was "
                "damaged on the way; copy or train it again"
            )
    if report.get("active") is False:
        raise ValueError(
            f"{folder} has exactly the weights of its base: training changed nothing, nothing to publish"
        )
    inputs = processor(text=["a calm tune"], padding=True, return_tensors="pt")
    tokens = family_of(model).num_frames_to_tokens(4, model.config)
    with (
        torch.no_grad(),
        reading(Path(folder) / "generation_config.json", "correct it: the model does not play with it"),
    ):
        audio = model.generate(**inputs, max_new_tokens=tokens, guidance_scale=1.0, do_sample=True)
    if not torch.isfinite(audio).all():
        raise ValueError(f"{folder} plays NaN or infinite samples: its training broke")


def require_repo_id(repo_id: str) -> None:
    """Raise `ValueError` for what is no "user/name"."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a Hub repository id: {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} lacks its owner: write user/{repo_id}")


def _require_recorded_base(folder: Path, recorded: str | None, base_model: str | None) -> None:
    """Refuse another base than the recorded one; a folder of this machine may be a copy of any."""
    if base_model is None or recorded in (None, base_model):
        return
    nano = Path(recorded).parts[-3:] == _NANO_BASE
    if nano or cards.is_hub_id(recorded):
        comes_from = "nano, the base that is shipped with diverse-cfg" if nano else recorded
        raise ValueError(
            f"{folder} comes from {comes_from}, not from {base_model}, and its card would say so: leave out "
            f"base_model (--base-model), or correct base_model in its {PROVENANCE_FILE}"
        )


def _require_same_weights(folder: Path, base_model: str) -> None:
    """Refuse to name a base that has other weights than the one that an adapter was trained on."""
    if base_name(folder) == base_model:
        return
    try:
        located = locate(base_model, cached=True)
    except FileNotFoundError:
        warnings.warn(
            f"{base_model} is not in the cache: whether {folder} was trained on its weights cannot be checked",
            UserWarning,
            stacklevel=3,
        )
        return
    require_named_base(folder, folder, base_model, FullCheckpoint(base_model, located).stored)


def _require_unguided(folder: Path, distilled: bool) -> None:
    config = load_generation_config(folder)
    if config is None:
        raise ValueError(f"{folder} has no generation_config.json: how it is sampled belongs to the model")
    if distilled and config.guidance_scale not in (None, 1.0):
        raise ValueError(
            f"{folder}/generation_config.json asks for guidance_scale={config.guidance_scale}, but the "
            "guidance is inside the weights already: set it to 1.0"
        )


def _with_public_base(folder: Path, adapter: bool, base_model: str | None) -> dict[str, bytes]:
    """Files that name places on this machine, with content that names Hub ids or nothing."""
    content = read_json(folder / PROVENANCE_FILE)
    theta0 = content.get("base_model")
    content["base_model"] = base_model or cards.public_name(content.get("base_model"))
    content["training"] = {
        key: cards.public_name(value) for key, value in content.get("training", {}).items()
    }
    replaced = {PROVENANCE_FILE: _json(content)}
    if adapter:
        content = read_json(folder / "adapter_config.json")
        recorded = content.get("base_model_name_or_path")
        if base_model == theta0 and recorded and read_provenance(recorded) is not None:
            raise ValueError(
                f"{folder} is an adapter of {recorded}, itself a student of {base_model}, and would be loaded onto "
                f"{base_model}: publish the full model (merged=True, --merged), or {recorded} first and name its id"
            )
        named = base_model or recorded
        if not cards.is_hub_id(named):
            raise ValueError(
                f"{folder} is an adapter of {named!r}, which others cannot load: pass the base's Hub id "
                "(base_model=…, --base-model), or publish the full model (merged=True, --merged)"
            )
        replaced["adapter_config.json"] = _json(content | {"base_model_name_or_path": named})
    return replaced


def _card(
    folder: Path,
    repo_id: str,
    base_model: str | None,
    license: str | None,
    tags: Sequence[str],
    space: str | None,
) -> str:
    """A card that somebody wrote is published as it is; ours is rendered anew, with the repository's name
    in it."""
    path = folder / cards.CARD_FILE
    card = path.read_text(encoding="utf-8") if path.is_file() else None
    if card is None or cards.is_generated(card):
        card = cards.render_card(
            folder, repo_id=repo_id, base_model=base_model, license=license, tags=tags, space=space
        )
    if ModelCard(card).data.license is None:
        raise ValueError(
            "the licence of the weights is not known (they inherit the base's): pass license=… "
            "(--license), e.g. cc-by-nc-4.0 for what derives from facebook/musicgen-*"
        )
    return card


def _require_no_secret(file: PlannedFile) -> None:
    if file.path_in_repo.endswith((".safetensors", ".wav", ".png")):
        return
    if TOKEN.search(file.content.decode(errors="replace")):
        raise ValueError(
            f"{file.path_in_repo} contains what looks like a Hub token: remove it (and revoke the token)"
        )


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"
