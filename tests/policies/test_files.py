"""Clips as a folder: complete files only, and an interrupted run goes on to the same clips."""

import copy
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

from diverse_cfg.policies import files
from diverse_cfg.policies.files import generate_files, write_wav
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.sampler.rollout import fast_generate
from tests.faults import held, without_privileges
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor


@pytest.fixture(scope="module")
def policy():
    return load_policy(tiny_musicgen())


def generate(model, output, prompts=PROMPTS, **settings):
    settings = {"num_frames": 12, "num_generations": 2, "seed": 4, "progress": False} | settings
    return generate_files(model, prompts, output, processor=tiny_processor(), **settings)


def test_wavs_and_their_list(policy, tmp_path):
    clips = generate(policy, tmp_path / "out", sample_format="float32", model_name="tiny", batch_size=3)
    manifest = json.loads((tmp_path / "out" / "generations.json").read_text())
    assert manifest["clips"] == clips
    assert manifest["settings"]["num_frames"] == 12
    assert manifest["model"] == "tiny"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "generations.json",
        *(clip["file"] for clip in clips),
    }
    expected = fast_generate(
        policy, PROMPTS, processor=tiny_processor(), num_frames=12, num_generations=2, seed=4
    )
    for clip, waveform in zip(clips, expected.waveforms, strict=True):
        assert clip["prompt"] == PROMPTS[clip["sample_id"] // 2]
        samples, rate = soundfile.read(tmp_path / "out" / clip["file"], dtype="float32")
        assert rate == 3200
        assert len(samples) == rate * clip["seconds"] * (64 * 50 / 3200)
        np.testing.assert_allclose(samples, waveform.numpy(), atol=1e-6)


def test_sixteen_bit_clips_full_scale_and_says_so(policy, tmp_path, caplog):
    policy = copy.deepcopy(policy)
    policy.audio_encoder.decoder.register_forward_hook(lambda module, args, audio: 1.1 * audio)
    clips = generate(policy, tmp_path / "out")
    loud = fast_generate(
        policy, PROMPTS, processor=tiny_processor(), num_frames=12, num_generations=2, seed=4
    )
    assert (loud.waveforms.abs() > 1).any()
    assert "clipped" in caplog.text
    for clip, waveform in zip(clips, loud.waveforms, strict=True):
        path = tmp_path / "out" / clip["file"]
        assert soundfile.info(path).subtype == "PCM_16"
        samples, _ = soundfile.read(path)
        np.testing.assert_allclose(samples, waveform.clamp(-1, 1).numpy(), atol=1e-4)


def test_stereo(tmp_path):
    clips = generate(load_policy(tiny_musicgen(2)), tmp_path / "out", PROMPTS[0], sample_format="float32")
    samples, _ = soundfile.read(tmp_path / "out" / clips[0]["file"])
    assert samples.shape == (12 * 64, 2)
    assert not np.array_equal(samples[:, 0], samples[:, 1])


def test_an_interrupted_run_goes_on_to_the_same_clips(policy, tmp_path, monkeypatch):
    whole = generate(policy, tmp_path / "whole")
    written = []

    def interrupted(path, *args):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write_wav(path, *args)

    monkeypatch.setattr(files, "write_wav", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(policy, tmp_path / "out", batch_size=2)
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in written}
    assert len(list((tmp_path / "out").glob("*.wav"))) == 3
    generate(policy, tmp_path / "out", resume=True)
    assert {path: path.stat().st_mtime_ns for path in written} == times
    for clip in whole:
        assert (tmp_path / "out" / clip["file"]).read_bytes() == (
            tmp_path / "whole" / clip["file"]
        ).read_bytes()


def test_damaged_clips_are_made_again(policy, tmp_path, caplog):
    """Fault: a clip that was cut off or overwritten passes for one of the run."""
    clips = generate(policy, tmp_path)
    paths = [tmp_path / clip["file"] for clip in clips[:3]]
    whole = [path.read_bytes() for path in paths]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(whole[1][:-100])
    write_wav(paths[2], torch.zeros(99), 3200)
    kept = (tmp_path / clips[3]["file"]).stat().st_mtime_ns
    generate(policy, tmp_path, resume=True)
    assert [path.read_bytes() for path in paths] == whole
    assert (tmp_path / clips[3]["file"]).stat().st_mtime_ns == kept
    assert all(f"{path} " in caplog.text for path in paths) and caplog.text.count("is made again") == 3


def test_another_model_or_dtype_does_not_go_on_with_a_folder(policy, tmp_path):
    """Fault: half of the clips are another model's, and nothing says so."""
    generate(policy, tmp_path / "out")
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.decoder.lm_heads[0].weight[0, 0] += 1
    for model, settings, name in ((other, {}, "weights"), (policy, {"dtype": torch.bfloat16}, "dtype")):
        with pytest.raises(ValueError, match=f"begun with another {name}"):
            generate(model, tmp_path / "out", resume=True, **settings)
    generate(policy, tmp_path / "out", resume=True, dtype=torch.float32)  # which the policy has


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_wav(tmp_path / "clip.wav", torch.zeros(10), 3200)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_touched(policy, tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    for resume, message in [(False, "not empty"), (True, r"no generations\.json")]:
        with pytest.raises(ValueError, match=message):
            generate(policy, tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(sys.platform != "linux", reason="privileges are Linux's")
def test_where_nothing_can_be_written_the_place_is_named_with_a_remedy(policy, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "closed").mkdir(mode=0o500)
    for name, remedy in (
        ("file", "a file is where a folder is needed"),
        ("file/below", "a file is where a folder is needed"),
        ("dangling", "a file is where a folder is needed"),
        ("closed/below", "no permission to write"),
        ("closed", "no permission to write"),
    ):
        with without_privileges(), pytest.raises(OSError, match=f"{name}[^ ]* cannot be written: .*{remedy}"):
            generate(policy, tmp_path / name)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "clips"),
        ({"guidance_scale": 3.0}, "settings"),
        ({"sample_format": "float32"}, "sample_format"),
    ],
)
def test_resuming_with_other_settings_is_refused(policy, tmp_path, change, named):
    """Half a folder of one seed and half of another would pass for one run."""
    generate(policy, tmp_path / "out", PROMPTS[:1])
    with pytest.raises(ValueError, match=f"begun with another .*{named}"):
        generate(policy, tmp_path / "out", PROMPTS[:1], resume=True, **change)
    (tmp_path / "out" / "generations.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        generate(policy, tmp_path / "out", PROMPTS[:1], resume=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": [""]},
        {"prompts": [*PROMPTS, "piano " * 512]},
        {"negative_prompt": "piano " * 512, "guidance_scale": 3.0},
        {"num_frames": 0},
        {"num_frames": 50000},
        {"num_generations": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"temperature": -1},
        {"sample_format": "mp3"},
        {"rollout_backend": "vllm"},
        {"negative_prompt": "noise"},
    ],
)
def test_bad_requests_leave_no_folder(policy, tmp_path, wrong):
    with pytest.raises(ValueError):
        generate(policy, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_two_cannot_write_into_one_folder(policy, tmp_path):
    """Catches two resumed runs that write the same files at once; what a killed one left goes."""
    generate(policy, tmp_path / "clips")
    leftover = tmp_path / "clips" / ".0000-00-clip.wav.0123abcd"
    leftover.touch()
    with held(tmp_path / "clips"), pytest.raises(FileExistsError, match="another process is writing to"):
        generate(policy, tmp_path / "clips", resume=True)
    generate(policy, tmp_path / "clips", resume=True)
    assert not leftover.exists()


def test_longer_than_the_model_can_sample_at_once(tmp_path):
    """The tiny model has positions for 125 frames: the rest is continued, the same again, and only where it can be."""
    policy, settings = (
        load_policy(tiny_musicgen()),
        {"processor": tiny_processor(), "num_frames": 180, "seed": 4},
    )
    for name in ("a", "b"):
        clips = generate_files(policy, PROMPTS[:2], tmp_path / name, progress=False, **settings)
    audio = [[soundfile.read(tmp_path / name / clip["file"])[0] for clip in clips] for name in ("a", "b")]
    assert all(len(samples) == 180 * 64 for samples in audio[0])
    assert all((one == other).all() for one, other in zip(*audio, strict=True))
    assert clips[0]["seconds"] == pytest.approx(180 / 50)
    with pytest.raises(
        ValueError, match=r"num_frames=180 takes several windows of 125, .*rollout_backend='fast'"
    ):
        generate_files(policy, PROMPTS[:2], tmp_path / "c", rollout_backend="transformers", **settings)
    assert not (tmp_path / "c").exists()
