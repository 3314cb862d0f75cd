"""Render the example cards of this folder: what a student, its adapter and a merge of musicgen-small would
say.

    python model_cards/render.py          # rewrites the .md files beside this one; the diff is reviewed
    like code

The settings are those of the recipes; nothing was trained for these files, so that they show no results,
samples or curves. `tests/test_cards.py` fails when a file here is not what the template renders.
"""

import json
import tempfile
from pathlib import Path

from diverse_cfg.cards import render_card
from diverse_cfg.provenance import Provenance, write_provenance

HERE = Path(__file__).parent
BASE = "facebook/musicgen-small"
SAMPLING = {"temperature": 1.0, "top_k": 0, "num_frames": 500}
# 10 s at 50 frames per second; four codebooks add three steps.
GENERATION = {"do_sample": True, "guidance_scale": 1.0, "max_new_tokens": 503, "temperature": 1.0, "top_k": 0}
VERSIONS = {
    "diverse-cfg": "0.1.0",
    "python": "3.11",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
}
TRAINING = {"initial_model": BASE, "clip_seconds": 10.0, "num_generations": 4, "divergence": "reverse_kl"}


def student(diversity_coef: float) -> Provenance:
    return Provenance(
        "student",
        base_model=BASE,
        guidance_scale=3.0,
        diversity_coef=diversity_coef,
        sampling=SAMPLING,
        training=TRAINING,
        versions=VERSIONS,
    )


def merge() -> Provenance:
    experts = [
        {"name": name, "weight": 0.5, "kind": "student", "guidance_scale": 3.0, "diversity_coef": beta}
        for name, beta in (("musicgen-small-quality", 0.0), ("musicgen-small-diversity", 15.0))
    ]
    return Provenance(
        "merge",
        base_model=BASE,
        guidance_scale=3.0,
        merge={"method": "linear", "format": "full", "dtype": "float32", "experts": experts},
        sampling=SAMPLING,
        versions=VERSIONS,
    )


def render_examples() -> dict[str, str]:
    """File name → card, from folders that hold everything but the weights."""
    examples = {
        "student-full.md": ("musicgen-small-quality", student(0.0), False),
        "student-adapter.md": ("musicgen-small-diversity-lora", student(15.0), True),
        "merge-full.md": ("musicgen-small-merged", merge(), False),
    }
    cards = {}
    with tempfile.TemporaryDirectory() as root:
        for file, (name, provenance, adapter) in examples.items():
            folder = Path(root) / name
            folder.mkdir()
            write_provenance(folder, provenance)
            (folder / "generation_config.json").write_text(json.dumps(GENERATION))
            if adapter:
                config = {"peft_type": "LORA", "base_model_name_or_path": BASE}
                (folder / "adapter_config.json").write_text(json.dumps(config))
            cards[file] = render_card(folder, repo_id=f"your-name/{name}")
    return cards


def main() -> None:
    for file, card in render_examples().items():
        (HERE / file).write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
