"""`diverse-cfg train-embedder`: from a folder, an evaluation or a model to an encoder on disk."""

import json

import pytest
import torch

from diverse_cfg.cli import main
from diverse_cfg.embeddings import load_embedder
from diverse_cfg.evaluation.cache import Cache
from tests.test_embeddings_training import write_tone

QUICK = ["--steps", "2", "--batch-size", "4", "--held-out", "0.3", "--device", "cpu"]


def run(*arguments):
    return main(["train-embedder", *map(str, arguments), *QUICK])


def test_a_folder_of_audio_becomes_an_embedder(tmp_path, capsys):
    for index in range(8):
        write_tone(tmp_path / f"{index}.wav", 100 + 50 * index)
    assert run("--audio", tmp_path, "--output", tmp_path / "encoder") == 0
    assert "retrieval@1 of 3 held-out recordings" in capsys.readouterr().out
    embedder = load_embedder(tmp_path / "encoder", device="cpu")
    assert (embedder.reads, embedder.sampling_rate) == ("waveforms", 3200)
    facts = json.loads((tmp_path / "encoder" / "training.json").read_text())
    assert facts["recordings"] == 8 and facts["chunk_seconds"] == 0.5
    assert str(tmp_path) not in json.dumps(facts)  # it may be published
    # Nothing is overwritten.
    assert run("--audio", tmp_path, "--output", tmp_path / "encoder") == 2
    assert "exists already" in capsys.readouterr().err


def test_clips_of_an_evaluation_become_an_embedder_of_codes(tiny_folder, tmp_path):
    codes = torch.randint(0, 16, (12, 4, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for seed in (0, 1):
        description = {"prompts": ["a", "b", "c", "d"], "num_generations": 3, "seed": seed}
        Cache(tmp_path / "sweep" / "cache").save("generations", description, {"codes": codes.numpy()})
    arguments = ["--codes", tmp_path / "sweep", "--model", tiny_folder, "--output", tmp_path / "encoder"]
    assert run(*arguments, "--negatives", "same-prompt") == 0
    embedder = load_embedder(tmp_path / "encoder", device="cpu")
    assert (embedder.reads, embedder.sampling_rate) == ("codes", 3200)
    assert embedder.embed(codes.long()).shape == (12, 64)
    facts = json.loads((tmp_path / "encoder" / "training.json").read_text())
    assert facts["negatives"] == "same-prompt" and facts["recordings"] == 24


def test_clips_are_sampled_for_prompts(tiny_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p}) for p in ("sad cello", "a song"))
    )
    arguments = ["--prompts", tmp_path, "--model", tiny_folder, "--output", tmp_path / "encoder"]
    assert run(*arguments, "--num-generations", "4", "--seconds", "0.6", "--guidance-scale", "1") == 0
    assert load_embedder(tmp_path / "encoder", device="cpu").reads == "codes"
    assert json.loads((tmp_path / "encoder" / "training.json").read_text())["recordings"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--audio", ".", "--model", "x"], "--model x has no effect with --audio"),
        (["--audio", ".", "--seconds", "3"], "--seconds 3.0 has no effect without --prompts"),
        (
            ["--codes", ".", "--model", "x", "--num-generations", "4"],
            "--num-generations 4 has no effect without",
        ),
        (["--audio", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["--codes", "."], "need --model"),
        (["--codes", "/no/such/folder", "--model", "x"], "holds no generations"),
        (["--codes", ".", "--model", "x", "--sampling-rate", "16000"], "--sampling-rate 16000 is of audio"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, arguments, message):
    assert run(*arguments, "--output", tmp_path / "encoder") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
