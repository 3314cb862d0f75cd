"""Trained parts → the folders that the package ships: base, judge, encoders, prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from captions import CLIP_SECONDS, caption
from codec import CODEBOOK_SIZE, HOP, NUM_CODEBOOKS, build_codec
from language_model import LanguageModel, build_language_model, build_tokenizer
from open_prompts import split_combinations, write_open_prompts
from render import SAMPLE_RATE
from transformers import (
    EncodecFeatureExtractor,
    GenerationConfig,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
)

from diverse_cfg.nano.attributes import ATTRIBUTES

CARD = """---
license: cc0-1.0
library_name: transformers
pipeline_tag: text-to-audio
tags: [musicgen, nano]
---
# nano MusicGen base

A `MusicgenForConditionalGeneration` of {parameters:.1f} M parameters: 16 kHz, 25 frames/s, 4 codebooks of 512 codes,
clips of 3 s.
Trained from scratch by `recipes/nano` of diverse-cfg on melodies of the
[OpenScore Lieder Corpus](https://github.com/OpenScore/Lieder) (CC0 1.0), rendered with FluidR3 (MIT). Weights: CC0 1.0.

It knows captions such as "a fast low melody in D minor on a violin": {instruments}; slow, medium or fast; low, middle
or high; keys on C, D, E, F sharp, A flat and B flat. It is a test bed for methods, not an instrument.
"""


def assemble_base(
    work: Path, quantizer: dict[str, torch.Tensor]
) -> tuple[MusicgenForConditionalGeneration, MusicgenProcessor]:
    """The averaged weights of vocoder, encoder and language model in one MusicGen with its processor."""
    codec = build_codec(quantizer)
    tokenizer = build_tokenizer()
    model = build_language_model(tokenizer)
    parts = {
        "vocoder": codec.decoder,
        "encoder": codec.encoder,
        "language_model": LanguageModel(model, tokenizer),
    }
    for name, module in parts.items():
        checkpoint = work / f"{name}.pt"
        if not checkpoint.is_file():
            raise FileNotFoundError(f"no {checkpoint}: run the stage `{name.replace('_', '-')}` first")
        module.load_state_dict(torch.load(checkpoint, weights_only=True)["average"])
    model.audio_encoder = codec
    model.generation_config = GenerationConfig(
        do_sample=True,
        guidance_scale=3.0,
        max_new_tokens=round(CLIP_SECONDS * SAMPLE_RATE / HOP) + NUM_CODEBOOKS - 1,
        pad_token_id=CODEBOOK_SIZE,
        bos_token_id=CODEBOOK_SIZE,
        decoder_start_token_id=CODEBOOK_SIZE,
    )
    model.config.pad_token_id = model.config.decoder_start_token_id = CODEBOOK_SIZE
    processor = MusicgenProcessor(
        EncodecFeatureExtractor(feature_size=1, sampling_rate=SAMPLE_RATE), tokenizer
    )
    return model.eval(), processor


def save_base(model: MusicgenForConditionalGeneration, processor: MusicgenProcessor, folder: Path) -> None:
    """Half-precision weights under a float32 configuration: half the size, and loaded in full precision."""
    model.half().save_pretrained(folder)
    model.float()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(
        CARD.format(instruments=", ".join(ATTRIBUTES["instrument"]), parameters=model.num_parameters() / 1e6)
    )


def write_prompts(folder: Path, seed: int) -> None:
    """The prompts `nano`, from `split_combinations`.

    Training prompts vary in wording and leave attributes out, as training captions do; the others name all four.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, chosen in split_combinations(seed).items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for attributes in chosen:
                wordings = (
                    {caption(attributes)}
                    if split != "train"
                    else {caption(attributes, rng) for _ in range(3)}
                )
                for prompt in sorted(wordings):
                    file.write(json.dumps({"prompt": prompt, "attributes": attributes}) + "\n")


def write_assets(work: Path, quantizer: dict[str, torch.Tensor], output: Path, seed: int) -> None:
    """Write all parts into `output`, replacing what was there only when the new one is complete."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_base(*assemble_base(work, quantizer), partial / "base")
    for part in ("judge", "reward-encoder", "within-encoder", "eval-encoder"):
        if not (work / part).is_dir():
            raise FileNotFoundError(f"no {work / part}: run the stage `judges` first")
        shutil.copytree(work / part, partial / part)
    write_prompts(partial / "prompts", seed)
    write_open_prompts(partial / "open-prompts", seed)
    size = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    if size > 20e6:
        raise ValueError(f"the assets take {size / 1e6:.1f} MB, more than the 20 MB a package may carry")
    if output.exists():
        shutil.rmtree(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(output)
