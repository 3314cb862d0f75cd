"""Checkpoints in, one interpolated checkpoint out (the paper's LERP, arXiv 2410.06084, and its uniform
average).

    θ_LERP = (1 − λ) · θ_quality + λ · θ_diversity

λ is `merge_weight`, the weight of the second checkpoint. The output folder is written tensor by tensor,
appears only when it is complete, and says in `merge.yaml` and `diverse_cfg.json` how it was made.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from diverse_cfg.atomic import new_folder, require_new
from diverse_cfg.cards import write_card
from diverse_cfg.merging.adapter import write_adapter
from diverse_cfg.merging.experts import DTYPES, Experts, open_experts
from diverse_cfg.merging.weights import resolve_weights
from diverse_cfg.policies.checkpoints import AdapterCheckpoint, open_checkpoint
from diverse_cfg.policies.families import PROCESSOR_FILES
from diverse_cfg.policies.loading import load_processor, require_processor
from diverse_cfg.policies.stored import Checkpoint
from diverse_cfg.policies.tensors import TensorSpec, write_safetensors
from diverse_cfg.provenance import PROVENANCE_FILE, Provenance, write_provenance
from diverse_cfg.reading import reading

RECIPE_FILE = "merge.yaml"
Format = Literal["full", "adapter"]
logger = logging.getLogger(__name__)


def merge_checkpoints(
    checkpoints: Sequence[str | os.PathLike],
    weights: float | Sequence[float] | None = None,
    output: str | os.PathLike = "merged",
    *,
    base: str | os.PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    extrapolate: bool = False,
    unnormalized: bool = False,
    format: Format = "full",
    bake_guidance: float | None = None,
) -> Path:
    """Interpolate the weights of checkpoints and write the result as a model that plain transformers loads.

        θ = θ_base + Σ_i w_i · (θ_i − θ_base)

    Exact for full models, for LoRA adapters of one base (the products B·A are mixed, not the factors) and
    for mixtures of both; the base itself is a valid expert. A weight of 1 gives that parent back to the
    bit.

    Args:
        checkpoints: folders or Hub ids of the experts.
        weights: None for the uniform average; one number for two experts, the weight λ of the second; or
            one number per expert.
        output: folder to create; it must not exist.
        base: the adapters' base, if it is not where they say; or the base of full models whose weights do
            not sum to 1.
        dtype: "float32", "bfloat16", "float16" or "float64" of the stored weights; by default the widest
            that an expert is stored in. The codec is never narrowed.
        extrapolate: allow weights outside [0, 1].
        unnormalized: allow weights that do not sum to 1.
        format: "full" for a complete model, "adapter" for one LoRA adapter whose rank is the sum of the
            experts'.
        bake_guidance: γ to fold into the weights, of experts that were trained for a range of them: the result is
            an ordinary model. By default it can be told any γ that they share.

    Returns:
        The output folder.

    Raises:
        ValueError: experts that cannot be mixed exactly, or weights that were not asked for.
        FileNotFoundError, FileExistsError, OSError: a missing expert, an existing output, no space.
    """
    require_new(output)
    if not checkpoints:
        raise ValueError("there is nothing to merge: give at least one checkpoint")
    resolved = resolve_weights(weights, len(checkpoints), extrapolate=extrapolate, unnormalized=unnormalized)
    experts = open_experts(checkpoints, base=base)
    experts.require_base(resolved)
    _check_baking(experts, bake_guidance, format)
    return _write(experts, resolved, Path(output), _resolve_dtype(dtype, experts), format, bake_guidance)


def merge_sweep(
    checkpoints: Sequence[str | os.PathLike],
    points: Sequence[float],
    output: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    extrapolate: bool = False,
    format: Format = "full",
    bake_guidance: float | None = None,
) -> list[Path]:
    """Merge two checkpoints at several weights: `output/weight-0.05`, `output/weight-0.1`…

    Merges that are there already, complete and with the same recipe, are kept, so that an interrupted sweep goes on.

    Args:
        checkpoints: two experts.
        points: weights λ of the second; `weights.parse_sweep` reads them from "0:1:0.05".
        output: folder of the merges.
        base, dtype, extrapolate, format, bake_guidance: as in `merge_checkpoints`.

    Returns:
        One folder per weight, in order.

    Raises:
        FileExistsError: a folder of another sweep, or of other weights at the same place.
        ValueError: a merge that is there is damaged, or see `merge_checkpoints`.
    """
    if len(checkpoints) != 2:
        raise ValueError(f"a sweep moves between two checkpoints, got {len(checkpoints)}")
    pairs = [resolve_weights(point, 2, extrapolate=extrapolate) for point in points]
    experts = open_experts(checkpoints, base=base)
    _check_baking(experts, bake_guidance, format)
    precision = _resolve_dtype(dtype, experts)
    folders = [Path(output) / f"weight-{point:g}" for point in points]
    missing = []
    for folder, weights in zip(folders, pairs, strict=True):
        recipe = _recipe(experts, weights, folder, precision, format, bake_guidance)
        if not folder.exists():
            missing.append((folder, weights))
        else:
            _require_done(folder, recipe, experts)
    for folder, weights in missing:
        _write(experts, weights, folder, precision, format, bake_guidance)
    return folders


def read_recipe(folder: str | os.PathLike) -> dict[str, Any] | None:
    """`merge.yaml` of a merged folder, None where there is none."""
    path = Path(folder) / RECIPE_FILE
    if not path.is_file():
        return None
    with reading(path):
        return yaml.safe_load(path.read_text(encoding="utf-8"))


def _require_done(folder: Path, recipe: dict[str, Any], experts: Experts) -> None:
    """Refuse a folder that is not the complete merge of this recipe."""
    with reading(folder, "delete it and run the sweep again"):
        found = read_recipe(folder) or {}
        if isinstance(known := found.get("fingerprints"), list):
            recipe = recipe | {"fingerprints": _fingerprints(experts, known)}
        # Older versions did not write them.
        if {"fingerprints": recipe["fingerprints"]} | found == recipe:
            merge = open_checkpoint(folder, base=experts.base)
            require_processor(merge.folder)
            if merge.provenance is None:
                raise ValueError(f"{folder} has no {PROVENANCE_FILE}")
            return
    if {**found, "fingerprints": None} == {**recipe, "fingerprints": None}:
        raise FileExistsError(
            f"{folder} was merged from other weights than its checkpoints have now: choose another output, or "
            "delete it and run the sweep again"
        )
    raise FileExistsError(f"{folder} exists and was not made by this sweep: choose another output")


def _resolve_dtype(dtype: str | torch.dtype | None, experts: Experts) -> torch.dtype:
    if dtype is None:
        return experts.default_dtype()
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return resolved


def _check_baking(experts: Experts, bake_guidance: float | None, format: Format) -> None:
    """Refuse a γ that cannot be folded into the merge."""
    if bake_guidance is None:
        return
    experts.require_guidance(bake_guidance)
    if format == "adapter":
        raise ValueError(
            f"bake_guidance={bake_guidance} (--bake-guidance) changes a bias, which no LoRA adapter holds: use "
            "format='full', or leave it out and tell the adapter its γ when it plays"
        )


def _write(
    experts: Experts,
    weights: list[float],
    output: Path,
    dtype: torch.dtype,
    format: Format,
    bake_guidance: float | None,
) -> Path:
    if format not in ("full", "adapter"):
        raise ValueError(f"format must be 'full' or 'adapter', got {format!r}")
    dtypes = {name: experts.output_dtype(name, dtype) for name in experts.names}
    specs = [TensorSpec(name, dtypes[name], experts.reference.tensors[name].shape) for name in experts.names]
    specs.sort(key=lambda spec: -spec.dtype.itemsize)  # stable: keeps every tensor aligned
    size = sum(spec.num_bytes for spec in specs) if format == "full" else 0
    shift = experts.shift(weights) if bake_guidance is None else None
    with new_folder(output, size) as folder, torch.no_grad():
        _copy_processor(experts, folder)
        if format == "full":
            write_safetensors(
                folder / "model.safetensors",
                specs,
                lambda name: experts.interpolate(name, weights, dtypes[name], bake_guidance),
            )
            experts.family.saved_config(experts.config, dtype).save_pretrained(folder)
        else:
            write_adapter(experts, weights, folder, dtype)
        if shift is not None:
            shift.save(folder)
        provenance = _provenance(experts, weights, dtype, format)
        if bake_guidance is not None:
            provenance = replace(provenance, guidance_scale=float(bake_guidance), guidance_range=None)
        elif shift is not None:
            knots = shift.guidance.knots
            provenance = replace(provenance, guidance_range=[knots[0], knots[-1]])
        experts.family.playing_config(
            experts.config, provenance.sampling, experts.settings, experts.guidance_scale
        ).save_pretrained(folder)
        write_provenance(folder, provenance)
        recipe = _recipe(experts, weights, output, dtype, format, bake_guidance)
        (folder / RECIPE_FILE).write_text(
            "# θ = θ_base + Σ weight · (θ_checkpoint − θ_base), interpolated by diverse-cfg\n"
            + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        write_card(folder, repo_id=output.resolve().name)
    logger.info("merged %s into %s", ", ".join(c.source for c in experts.checkpoints), output)
    return output


def _copy_processor(experts: Experts, folder: Path) -> None:
    candidates = [experts.reference, *experts.checkpoints]
    source = next((c.folder for c in candidates if not experts.family.missing_processor(c.folder)), None)
    if source is None:
        raise ValueError(
            f"none of {', '.join(c.source for c in candidates)} has a tokenizer and a processor, without "
            "which the merged model cannot read prompts: copy them from the base into one of the folders, "
            "or pass base=…"
        )
    load_processor(source)
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _method(dtype: torch.dtype, format: Format) -> dict[str, Any]:
    return {"method": "linear", "format": format, "dtype": str(dtype).removeprefix("torch.")}


def _recipe(
    experts: Experts,
    weights: list[float],
    output: Path,
    dtype: torch.dtype,
    format: Format,
    bake_guidance: float | None,
) -> dict[str, Any]:
    pairs = zip(experts.checkpoints, weights, strict=True)
    parents = [{"checkpoint": _reachable(c, output), "weight": w, "kind": c.kind} for c, w in pairs]
    base = {"base": _reachable(experts.reference, output)} if experts.adapters else {}
    fingerprints = {"fingerprints": _fingerprints(experts)}
    baked = {} if bake_guidance is None else {"bake_guidance": float(bake_guidance)}
    return _method(dtype, format) | baked | {"experts": parents} | base | fingerprints


def _fingerprints(experts: Experts, like: Sequence[str] = ()) -> list[str]:
    used = [*experts.checkpoints, *([experts.reference] if experts.adapters else [])]
    records = [str(record) for record in like] if len(like) == len(used) else [None] * len(used)
    return [checkpoint.fingerprint(record) for checkpoint, record in zip(used, records, strict=True)]


def _reachable(checkpoint: Checkpoint, output: Path) -> str:
    """A path from the output that can be followed if the folders stay together, and that tells nothing else.

    Merges are published, so that an absolute path (with the user's name in it) must not end up in their
    recipe.
    """
    if not Path(checkpoint.source).exists():
        return checkpoint.name
    relative = os.path.relpath(checkpoint.folder.resolve(), output.resolve())
    return relative if relative.count("..") <= 2 else checkpoint.name


def _provenance(experts: Experts, weights: list[float], dtype: torch.dtype, format: Format) -> Provenance:
    known = [c.provenance for c in experts.checkpoints if c.provenance is not None]
    if len(experts.checkpoints) == 1 and known:
        return known[0]  # an adapter folded into its base is the student that it was
    if not experts.distilled:
        warnings.warn(
            "none of the checkpoints says that it was distilled (no diverse_cfg.json): the merged model is saved with "
            f"their own guidance_scale={experts.guidance_scale or 1.0:g}; pass another when generating if needed",
            UserWarning,
            stacklevel=4,
        )
    scales = {p.guidance_scale for p in known}
    samplings = [p.sampling for p in known]
    if any(sampling != samplings[0] for sampling in samplings[1:]):
        warnings.warn(
            f"the checkpoints were trained with different sampling settings {samplings}; the merged model "
            "is saved with the first",
            UserWarning,
            stacklevel=4,
        )
    named = {p.base_model for p in known}
    base_model = named.pop() if len(named) == 1 else None
    if base_model is None and experts.adapters:
        base_model = experts.adapters[0].lora.base_model_name_or_path or experts.reference.name
    return Provenance(
        kind="merge",
        base_model=base_model,
        guidance_scale=scales.pop() if len(scales) == 1 else None,
        merge=_method(dtype, format)
        | {"experts": [_parent(c, w) for c, w in zip(experts.checkpoints, weights, strict=True)]},
        sampling=samplings[0] if samplings else {},
        distilled=experts.distilled,
    )


def _parent(checkpoint: Checkpoint, weight: float) -> dict[str, Any]:
    parent: dict[str, Any] = {"name": checkpoint.name, "weight": weight, "kind": checkpoint.kind}
    if checkpoint.provenance is not None:
        parent["kind"] = checkpoint.provenance.kind
        parent["guidance_scale"] = checkpoint.provenance.guidance_scale
        parent["diversity_coef"] = checkpoint.provenance.diversity_coef
        if checkpoint.provenance.merge:
            parent["experts"] = checkpoint.provenance.merge.get("experts", [])
    elif not isinstance(checkpoint, AdapterCheckpoint):
        parent["kind"] = "full"
    return parent
