"""Tiny checkpoints on disk for the tests of merging, cards and publishing, and an oracle that knows none of
our code.

The oracle reads safetensors with the library itself and computes in NumPy float64, from the LoRA settings
that the *test* states (rank, alpha), not from the files that our code reads.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MusicgenForConditionalGeneration

from diverse_cfg.merging import merge_checkpoints
from diverse_cfg.provenance import Provenance, write_provenance
from tests.tiny import save_tiny, tiny_musicgen

MODEL = "model.safetensors"
LICENSE = "cc-by-nc-4.0"
LORA1 = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "fc1", "embed_tokens.0"]}
LORA2 = {
    "r": 4,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"v_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 7},
}


def lora1_scaling(name: str) -> float:
    """α / r of LORA1, by hand."""
    return 3 / 2


def lora2_scaling(name: str) -> float:
    """α / r of LORA2, by hand."""
    if name.endswith("layers.0.self_attn.v_proj.weight"):
        return 7 / 3
    return 4 / 3 if "v_proj" in name else 4 / 4


def make_world(root: Path) -> dict[str, Path]:
    """One base, two full fine-tunes of it, and two adapters of different ranks and targets, all students."""
    base = make_base(root / "base")
    folders = {
        "base": base,
        "full1": make_full(root / "full1", base, seed=1),
        "full2": make_full(root / "full2", base, seed=2),
        "lora1": make_adapter(root / "lora1", base, seed=1, **LORA1),
        "lora2": make_adapter(root / "lora2", base, seed=2, **LORA2),
    }
    for name in ("full1", "full2", "lora1", "lora2"):
        student = Provenance(
            "student",
            base_model="user/base",
            guidance_scale=3.0,
            diversity_coef=0.0 if name.endswith("1") else 15.0,
            sampling={"temperature": 1.0, "top_k": 0, "num_frames": 17},
        )
        write_provenance(folders[name], student)
    return folders


def make_merges(root: Path) -> dict[str, Path]:
    """`make_world`, and the same merge of its adapters as a full model and as an adapter."""
    folders = make_world(root)
    pair = [folders["lora1"], folders["lora2"]]
    folders["merged"] = merge_checkpoints(pair, 0.3, root / "merged")
    folders["adapter"] = merge_checkpoints(pair, 0.3, root / "adapter", format="adapter")
    return folders


def make_base(folder: Path) -> Path:
    return Path(save_tiny(folder))


def make_full(folder: Path, base: Path, seed: int, shared: tuple[str, ...] = ("audio_encoder.",)) -> Path:
    """A fine-tune of the whole base: other decoder and text encoder, the same codec (or what else is `shared`)."""
    shutil.copytree(base, folder)
    weights = load_file(base / MODEL)
    trained = {k: v for k, v in tiny_musicgen(seed=seed).state_dict().items() if k in weights}
    weights.update({k: v.clone() for k, v in trained.items() if not k.startswith(shared)})
    save_file(weights, folder / MODEL, metadata={"format": "pt"})
    return folder


def make_adapter(folder: Path, base: Path, seed: int, **lora) -> Path:
    """A LoRA adapter with visible products (a fresh one has B = 0); weights moderate, as training leaves
    them."""
    model = MusicgenForConditionalGeneration.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(**lora))
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2 if "lora_" in name else 1.0)
    wrapped.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def numpy_weights(folder: Path, name: str = MODEL) -> dict[str, np.ndarray]:
    return {key: tensor.double().numpy() for key, tensor in load_file(folder / name).items()}


def numpy_products(adapter: Path, scaling) -> dict[str, np.ndarray]:
    """Name of the adapted weight → scaling · B·A; `scaling` maps the name to the number that the test
    knows."""
    factors = numpy_weights(adapter, "adapter_model.safetensors")
    products = {}
    for key, lora_a in factors.items():
        path = key.removeprefix("base_model.model.")
        if path.endswith(".lora_A.weight"):
            name = path.removesuffix(".lora_A.weight") + ".weight"
            products[name] = scaling(name) * factors[key.replace("lora_A", "lora_B")] @ lora_a
        elif path.endswith(".lora_embedding_A"):
            name = path.removesuffix(".lora_embedding_A") + ".weight"
            products[name] = scaling(name) * (factors[key.replace("_A", "_B")] @ lora_a).T
    return products


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> MusicgenForConditionalGeneration:
    model = MusicgenForConditionalGeneration.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def teacher_forced_logits(model: MusicgenForConditionalGeneration) -> torch.Tensor:
    """Logits of fixed inputs, to compare two models by what they compute."""
    codes = torch.arange(2 * 4 * 6).reshape(8, 6) % model.config.decoder.vocab_size
    text = torch.tensor([[3, 4, 5, 1], [6, 7, 1, 0]])
    with torch.no_grad():
        return model(input_ids=text, attention_mask=(text > 0).long(), decoder_input_ids=codes).logits
