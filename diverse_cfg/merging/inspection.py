"""What a checkpoint is, and the proof that its training changed something.

A LoRA adapter that was never trained, saved too early or loaded by a program that ignores it sounds exactly
like its base. So the report measures how far the weights lie from the base's, part by part.
"""

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from diverse_cfg.policies.checkpoints import AdapterCheckpoint, open_checkpoint
from diverse_cfg.policies.families import has_processor_files
from diverse_cfg.policies.loading import load_processor
from diverse_cfg.policies.stored import FullCheckpoint, locate


def inspect_checkpoint(path: str | os.PathLike, *, base: str | os.PathLike | None = None) -> dict[str, Any]:
    """Describe a model folder or Hub id, without building the model.

    Args:
        path: full model or adapter.
        base: what to compare with, if the checkpoint does not name its base or names a place where it is not.

    Returns:
        kind ("base", "student", "merge", or "full" and "adapter", of unknown origin), distilled (whether guidance is in
        the weights), format ("full" or "adapter"),
        base_model, guidance_scale (γ of the teacher, inside the weights), guidance_range (γ that it
        can be told), generation_guidance_scale (what
        it will be generated with), diversity_coef, parents with their merge weights, sampling, versions,
        architecture, number of parameters, stored types, not_finite and all_zero (names of weights that are NaN or
        infinite, and of matrices that are nothing but zeros and not the base's), and `difference`: relative
        distance from the base per part, or None with `difference_note` where the base cannot be found.

    Raises:
        ValueError, FileNotFoundError: not a MusicGen checkpoint, or a damaged one.
    """
    given = FullCheckpoint(base, locate(base)) if base is not None else None
    checkpoint = open_checkpoint(path, base=given)
    provenance = checkpoint.provenance
    owner = checkpoint if has_processor_files(checkpoint.folder) else checkpoint.base
    load_processor(owner.folder)
    report: dict[str, Any] = {
        "name": checkpoint.name,
        "kind": _kind(checkpoint),
        "format": checkpoint.kind,
        "base_model": _base_model(checkpoint),
        "distilled": checkpoint.distilled,
        "guidance_scale": provenance.guidance_scale if provenance else None,
        "guidance_range": provenance.guidance_range if provenance else None,
        "generation_guidance_scale": _generation_guidance(checkpoint),
        "diversity_coef": provenance.diversity_coef if provenance else None,
        "parents": (provenance.merge or {}).get("experts", []) if provenance else [],
        "sampling": provenance.sampling if provenance else {},
        "versions": provenance.versions if provenance else {},
        "architecture": checkpoint.family.describe(checkpoint.base.config),
        **_size(checkpoint),
    }
    known = _known_base(checkpoint, given)
    return report | _difference(checkpoint, known) | _damage(checkpoint, known)


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `inspect_checkpoint` as lines for a terminal."""
    shape = report["architecture"]
    rows = [
        ("checkpoint", report["name"]),
        ("kind", f"{report['kind']} ({report['format']})"),
        ("base", report["base_model"] or "not recorded"),
        (
            "distilled from γ",
            "not recorded" if report["guidance_scale"] is None else f"{report['guidance_scale']:g}",
        ),
        ("generates with γ", _generation_text(report)),
    ]
    if report["guidance_range"]:
        rows.append(("can be told γ from", "{:g} to {:g}".format(*report["guidance_range"])))
    if report["diversity_coef"] is not None:
        rows.append(("diversity_coef β", f"{report['diversity_coef']:g}"))
    rows += [("parent", f"{p['name']} × {p['weight']:g}") for p in report["parents"]]
    if report["sampling"]:
        rows.append(("sampling", ", ".join(f"{key} {value}" for key, value in report["sampling"].items())))
    rows += [
        (
            "model",
            f"{shape['decoder_layers']} layers × {shape['hidden_size']}, {shape['codebooks']} codebooks × "
            f"{shape['codebook_size']}, {shape['sampling_rate']} Hz, {shape['audio_channels']} channel(s)",
        ),
        ("stored", f"{report['num_parameters']:,} parameters, {', '.join(report['dtypes'])}"),
    ]
    if report["not_finite"]:
        rows.append(
            ("DAMAGED", f"NaN or infinite values in {_first(report['not_finite'])}: its training broke")
        )
    if report["all_zero"]:
        rows.append(
            ("DAMAGED", f"nothing but zeros in {_first(report['all_zero'])}: copy or download it again")
        )
    if report["difference"] is None:
        rows.append(("against the base", report["difference_note"]))
    else:
        total = report["difference"]
        verdict = "differs from the base" if report["active"] else "IDENTICAL TO THE BASE: it has no effect"
        if not math.isfinite(total["relative"]):
            verdict = "BROKEN: it or its base has NaN or infinite values"
        rows.append(
            (
                "against the base",
                f"{verdict}; ‖Δ‖ / ‖θ‖ = {total['relative']:.3g}, {total['changed_tensors']} of "
                f"{total['tensors']} tensors changed",
            )
        )
        rows += [
            (f"  {part}", f"{values['relative']:.3g} ({values['changed_tensors']} of {values['tensors']})")
            for part, values in total["parts"].items()
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def _generation_text(report: Mapping[str, Any]) -> str:
    scale = report["generation_guidance_scale"]
    text = "1 (no guidance)" if scale in (None, 1) else f"{scale:g}"
    if scale in (None, 1) or not report["distilled"]:
        return text
    if report["format"] == "adapter":
        return (
            f"1 here; OTHER PROGRAMS GUIDE TWICE: they take its base's {text}, pass them guidance_scale=1.0"
        )
    return f"{text}: GUIDED TWICE, pass guidance_scale=1.0"


def _kind(checkpoint: FullCheckpoint | AdapterCheckpoint) -> str:
    if checkpoint.provenance is not None:
        return checkpoint.provenance.kind
    if isinstance(checkpoint, AdapterCheckpoint):
        return "student" if checkpoint.distilled else "adapter"
    # The released checkpoints, and the nano base, ask for guidance in their own generation config.
    guidance = _generation_guidance(checkpoint)
    return "base" if guidance is not None and guidance > 1 else "full"


def _base_model(checkpoint: FullCheckpoint | AdapterCheckpoint) -> str | None:
    if isinstance(checkpoint, AdapterCheckpoint):
        return checkpoint.lora.base_model_name_or_path or checkpoint.base.name
    return checkpoint.provenance.base_model if checkpoint.provenance else None


def _generation_guidance(checkpoint: FullCheckpoint | AdapterCheckpoint) -> float | None:
    # Programs other than ours take an adapter's generation config from its base.
    own = checkpoint.base.generation if checkpoint.distilled else checkpoint.settings
    return own and own.guidance_scale


def _size(checkpoint: FullCheckpoint | AdapterCheckpoint) -> dict[str, Any]:
    lora: dict[str, Any] = {}
    if isinstance(checkpoint, FullCheckpoint):
        with torch.device("meta"):  # the files hold the codec's buffers too
            model = checkpoint.family.build(checkpoint.config)
        infos = [checkpoint.tensors[name] for name, _ in model.named_parameters()]
    else:
        infos = [*itertools.chain(*checkpoint.factors.values()), *checkpoint.replaced.values()]
        lora = {"lora_rank": checkpoint.lora.r, "lora_modules": len(checkpoint.factors)}
    return {
        "num_parameters": sum(info.num_bytes // info.dtype.itemsize for info in infos),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos}),
    } | lora


def _known_base(
    checkpoint: FullCheckpoint | AdapterCheckpoint, given: FullCheckpoint | None
) -> FullCheckpoint | str:
    """The base to compare with, or why there is none."""
    if isinstance(checkpoint, AdapterCheckpoint):
        return checkpoint.base
    if given is not None:
        return given
    named = _base_model(checkpoint)
    if named is None:
        return "it does not name a base: pass one to compare"
    try:
        return FullCheckpoint(named, locate(named, near=checkpoint.folder))
    except (ValueError, OSError) as error:
        return f"not compared: {error}"


def _damage(
    checkpoint: FullCheckpoint | AdapterCheckpoint, base: FullCheckpoint | str
) -> dict[str, list[str]]:
    """Weights as a broken training or a broken copy leaves them: not finite, or a whole matrix of zeros."""
    not_finite, all_zero = [], []
    for name in checkpoint.base.tensors:
        values = checkpoint.stored_values(name)
        if not all(torch.isfinite(value).all() for value in values):
            not_finite.append(name)
        if name.startswith(checkpoint.family.codec_prefix) or not values:
            continue
        # A fresh adapter has one factor of zeros, never both.
        zero = all(value.ndim > 1 and not value.any() for value in values)
        if zero and (isinstance(base, str) or base.stored(name).any()):
            all_zero.append(name)
    return {"not_finite": not_finite, "all_zero": all_zero}


def _difference(checkpoint: FullCheckpoint | AdapterCheckpoint, base: FullCheckpoint | str) -> dict[str, Any]:
    """How far the weights lie from the base's: ‖θ − θ_base‖ / ‖θ_base‖, in all and per part of the model."""
    if isinstance(base, str):
        return {"difference": None, "difference_note": base}
    family = base.family
    if isinstance(checkpoint, FullCheckpoint) and family.architecture(base.config) != family.architecture(
        checkpoint.config
    ):
        raise ValueError(f"{checkpoint.source} and {base.source} have different architectures: not its base")
    parts: dict[str, dict[str, float]] = {}
    for name in base.tensors:
        part = parts.setdefault(
            family.part_of(name), {"difference": 0.0, "base": 0.0, "tensors": 0, "changed_tensors": 0}
        )
        reference = base.tensor(name, torch.float32)
        change = checkpoint.difference(name, reference) if checkpoint.changes(name) else None
        squared = 0.0 if change is None else change.double().square().sum().item()
        part["difference"] += squared
        part["base"] += reference.double().square().sum().item()
        part["tensors"] += 1
        part["changed_tensors"] += squared != 0  # NaN too
    total = {
        key: sum(part[key] for part in parts.values())
        for key in ("difference", "base", "tensors", "changed_tensors")
    }
    summary = _relative(total) | {"parts": {name: _relative(part) for name, part in parts.items()}}
    return {"difference": summary, "active": total["changed_tensors"] > 0}


def _relative(part: Mapping[str, float]) -> dict[str, Any]:
    relative = (part["difference"] / part["base"]) ** 0.5 if part["base"] else float(part["difference"] > 0)
    return {
        "relative": relative,
        "changed_tensors": int(part["changed_tensors"]),
        "tensors": int(part["tensors"]),
    }
