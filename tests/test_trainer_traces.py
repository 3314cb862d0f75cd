"""Loss traces of short runs, committed: a change that should change nothing must leave them as they are.

After a change that is meant to change them: `python -m tests.test_trainer_traces` writes them anew; say why
in the commit. The file tells the environment that it was made in.
"""

import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
import trl
from peft import LoraConfig

from tests.tiny import tiny_musicgen
from tests.training import tiny_trainer

TRACES = Path(__file__).parent / "traces" / "trainer.json"
STEPS = 6
COLUMNS = ("loss", "kl/clip", "reward/diversity", "grad_norm")
RUNS = {
    "full": {},
    "lora": {"peft_config": LoraConfig(r=2, lora_alpha=4)},
    "forward KL, negative prompt": {"divergence": "forward_kl", "negative_prompt": "sad cello"},
    "prefix baseline, average, adaptive clip": {
        "prefix_baseline": True,
        "prefix_lambda": 0.6,
        "ema_decay": 0.9,
        "adaptive_clip": 1.5,
        "max_grad_norm": 0.0,
    },
    "clips used twice": {"num_iterations": 2},
    "mixed rollouts": {"rollout_source": "mix"},
    "gradient through the sampling": {"sequence_score": True},
    "stereo": {"stereo": True},
}


def trace(name, folder):
    settings = dict(RUNS[name])
    if settings.pop("stereo", False):
        settings["model"] = tiny_musicgen(audio_channels=2)
    trainer = tiny_trainer(folder, max_steps=STEPS, **settings)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {column: [entry.get(column) for entry in logs] for column in COLUMNS}


@pytest.mark.parametrize("name", RUNS)
def test_run_follows_its_trace(tmp_path, name):
    """Fault: anything that changes what is trained, in whatever module."""
    recorded = json.loads(TRACES.read_text())["runs"][name]
    found = trace(name, tmp_path)
    for column in COLUMNS:
        pairs = zip(found[column], recorded[column], strict=True)
        for step, (now, then) in enumerate(pairs, start=1):
            assert (now is None) == (then is None), (column, step)
            assert now is None or now == pytest.approx(then, rel=2e-3, abs=2e-4), (column, step)


def test_every_trace_has_its_run():
    assert json.loads(TRACES.read_text())["runs"].keys() == RUNS.keys()


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: trace(name, folder) for name in RUNS}
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    TRACES.write_text(json.dumps({"environment": environment, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    record()
