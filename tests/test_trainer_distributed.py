"""Two processes on one machine must be one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli_finetune import folder_of

ROOT = Path(__file__).parent.parent

RUN = """
import json, os, sys
import torch
from peft import LoraConfig
from tests.training import tiny_trainer, trained

folder, settings = sys.argv[1], json.loads(sys.argv[2])
if settings.pop("lora"):
    settings["peft_config"] = LoraConfig(r=2, lora_alpha=4)
if "WORLD_SIZE" in os.environ:
    settings["ddp_backend"] = "gloo"
trainer = tiny_trainer(folder, **settings)
trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
weights = trained(trainer)
checksum = {name: value.double().sum().item() for name, value in weights.items()}
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
result = {"checksum": checksum, "logs": logs, "processes": trainer.accelerator.num_processes}
with open(f"{folder}/result-{trainer.accelerator.process_index}.json", "w") as file:
    json.dump(result, file)
# Left to the interpreter's exit, or while the other process still talks, gloo's threads now and then abort.
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
sys.stdout.flush()
os._exit(0)
"""


FINETUNING = (
    RUN.replace("tests.training import tiny_trainer", "tests.test_finetuning import sft_trainer")
    .replace(
        "tiny_trainer(folder,", "sft_trainer(folder, find_recordings(os.path.join(folder, '..', 'music')),"
    )
    .replace("import torch\n", "import torch\nfrom diverse_cfg.recordings import find_recordings\n")
    .replace("weights = ", "trainer.evaluate()\nweights = ")
    .replace('"loss" in entry', '"loss" in entry or "eval_loss" in entry')
)


def run(folder, processes, program=RUN, **settings):
    folder.mkdir(exist_ok=True)
    script = folder / "run.py"
    script.write_text(program)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # an abort in native code says where Python was
    done = subprocess.run(
        [*launcher, str(script), str(folder), json.dumps(settings)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]


CASES = {
    "full": {"lora": False},
    "lora": {"lora": True},
    "prefix baseline, mixed rollouts": {"lora": False, "prefix_baseline": True, "rollout_source": "mix"},
    "a range of guidance": {"lora": True, "guidance_scale": {"low": 1, "high": 5}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(tmp_path, case):
    """Fault: gradients that are not averaged (a loss outside the wrapped forward), groups torn apart, or
    noise that depends on the process."""
    (single,) = run(tmp_path / "one", 1, **CASES[case])
    first, second = run(tmp_path / "two", 2, per_device_train_batch_size=4, **CASES[case])
    assert (single["processes"], first["processes"]) == (1, 2)
    assert first["checksum"] == second["checksum"]
    for name in ("loss", "kl/clip", "reward/diversity", "grad_norm"):
        wanted = [entry[name] for entry in single["logs"]]
        assert [entry[name] for entry in first["logs"]] == pytest.approx(wanted, rel=1e-4, abs=1e-5), name
    assert first["checksum"] == pytest.approx(single["checksum"], rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_two_processes_resume_inside_a_generation_block(tmp_path):
    """Fault: every process continues with the first one's clips."""
    settings = {"lora": False, "per_device_train_batch_size": 4, "num_iterations": 2, "max_steps": 4}
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    straight, _ = run(tmp_path / "straight", 2, **settings, **saving)
    checkpoint = str(tmp_path / "straight" / "checkpoint-3")
    again, _ = run(tmp_path / "again", 2, **settings, **saving, resume_from_checkpoint=checkpoint)
    assert again["checksum"] == straight["checksum"]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_finetune_as_one(tmp_path, lora):
    """Faults: a loss that is divided by the codes of one process, clips that both see, a held-out loss of one half."""
    folder_of(tmp_path / "music")
    settings = {"program": FINETUNING, "lora": lora, "max_steps": 2, "clip_seconds": 0.3}
    (single,) = run(tmp_path / "one", 1, per_device_train_batch_size=4, **settings)
    first, second = run(tmp_path / "two", 2, per_device_train_batch_size=2, **settings)
    assert (single["processes"], first["processes"]) == (1, 2)
    assert first["checksum"] == second["checksum"]
    for name in ("loss", "grad_norm", "eval_loss", "eval_loss/no_text"):
        wanted = [entry[name] for entry in single["logs"] if name in entry]
        assert [entry[name] for entry in first["logs"] if name in entry] == pytest.approx(wanted, rel=1e-4), (
            name
        )
        assert wanted
    assert first["checksum"] == pytest.approx(single["checksum"], rel=1e-3, abs=1e-3)
