"""Takes: codes beside the audio, what is continued from them, and of many samples those that differ most."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from diverse_cfg.acoustics import validity
from diverse_cfg.assets import nano_path
from diverse_cfg.policies.files import generate_files
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.sampler.extension import extend, hybrid_generate
from diverse_cfg.policies.sampler.rollout import decode_codes, fast_generate
from diverse_cfg.policies.takes import load_take
from diverse_cfg.subset import diverse_subset
from diverse_cfg.types import Clips
from tests.evaluation.worlds import CodesEncoder, WaveEncoder
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor


@pytest.fixture(scope="module")
def policy():
    return load_policy(tiny_musicgen())


def write_takes(model, output, prompts=PROMPTS[:1], **settings):
    settings = {
        "num_frames": 12,
        "num_generations": 3,
        "seed": 4,
        "progress": False,
        "takes": True,
    } | settings
    return generate_files(model, prompts, output, processor=tiny_processor(), **settings)


def test_takes_are_the_samples_of_the_seed_with_their_codes_and_a_page(policy, tmp_path):
    """Faults: codes of another clip beside the audio; a cost that forgets the null rows; a page that lacks one."""
    clips = write_takes(policy, tmp_path, guidance_scale=3.0, batch_size=2)
    assert [clip["file"] for clip in clips] == ["take-00.wav", "take-01.wav", "take-02.wav"]
    settings = {"processor": tiny_processor(), "num_frames": 12, "seed": 4, "guidance_scale": 3.0}
    expected = fast_generate(policy, PROMPTS[0], num_generations=3, **settings)
    page = (tmp_path / "index.html").read_text()
    for row, clip in enumerate(clips):
        take = load_take(policy, tmp_path / clip["file"])
        assert torch.equal(take.codes, expected.codes[row : row + 1]) and take.prompts == PROMPTS[:1]
        assert clip["sample_id"] == row and clip["decoder_rows"] == 2 * (12 + 3)
        assert f'src="{clip["file"]}"' in page
    several = write_takes(policy, tmp_path / "more", [PROMPTS[0], "<b>sad</b> cello"], num_generations=1)
    assert [clip["file"] for clip in several] == ["0000-take-00.wav", "0001-take-00.wav"]
    assert "&lt;b&gt;sad&lt;/b&gt; cello" in (tmp_path / "more" / "index.html").read_text()


def test_a_take_without_its_codes_is_made_again(policy, tmp_path):
    """Fault: a folder that counts as finished, of which one take cannot be continued."""
    write_takes(policy, tmp_path)
    codes = load_file(tmp_path / "take-01.safetensors")["codes"]
    (tmp_path / "take-01.safetensors").unlink()
    write_takes(policy, tmp_path, resume=True)
    assert torch.equal(load_file(tmp_path / "take-01.safetensors")["codes"], codes)


@pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
def test_audio_without_codes_is_encoded_by_the_codec(channels, tmp_path):
    """Faults: channels mixed, interleaved the wrong way round, or scaled; samples at another rate taken as they are."""
    model = load_policy(tiny_musicgen(channels))
    audio = torch.rand(channels, 10 * 64, generator=torch.Generator().manual_seed(0)) - 0.5
    soundfile.write(tmp_path / "a.wav", audio.T.numpy(), 3200, "FLOAT")
    found = load_take(model, tmp_path / "a.wav")
    assert found.prompts is None and found.codes.shape == (1, 4 * channels, 10)
    for channel in range(channels):
        stock = model.audio_encoder.encode(audio[None, channel : channel + 1]).audio_codes[0, 0]
        assert torch.equal(found.codes[0, channel::channels], stock)
    double = np.repeat(audio.numpy(), 2, axis=1)  # twice the rate: as long when it is resampled
    soundfile.write(tmp_path / "b.wav", double.T, 6400, "FLOAT")
    assert load_take(model, tmp_path / "b.wav").codes.shape == (1, 4 * channels, 10)
    other = load_policy(tiny_musicgen(3 - channels))  # mono for a stereo model, and the other way round
    mixed = load_take(other, tmp_path / "a.wav").codes
    stock = other.audio_encoder.encode(audio.mean(0)[None, None]).audio_codes[0, 0]
    assert torch.equal(mixed[0, :: 3 - channels], stock)


def test_codes_of_another_codec_or_another_clip_are_refused(policy, tmp_path):
    """Fault: numbers of one codebook looked up in another, which plays noise without a word."""
    write_takes(policy, tmp_path, num_generations=1)
    wav = tmp_path / "take-00.wav"
    other = load_policy(tiny_musicgen(seed=1))
    student = load_policy(tiny_musicgen())
    student.decoder.load_state_dict(other.decoder.state_dict())
    assert len(load_take(student, wav)) == 1  # its codec is the base's
    for model in (other, load_policy(tiny_musicgen(2))):
        with pytest.raises(ValueError, match=r"take-00.safetensors holds codes of another codec .* move"):
            load_take(model, wav)
    samples, rate = soundfile.read(wav)
    soundfile.write(wav, samples[:-200], rate)
    with pytest.raises(ValueError, match=r"lasts 0.18 s, its codes 0.24 s: it was changed; move"):
        load_take(policy, wav)
    (tmp_path / "take-00.safetensors").write_bytes(b"no codes")
    with pytest.raises(ValueError, match=r"take-00.safetensors cannot be read .* move this file away"):
        load_take(policy, wav)
    (tmp_path / "take-00.safetensors").unlink()
    assert load_take(policy, wav).codes.shape[-1] == 9
    soundfile.write(wav, np.zeros(0), rate)
    with pytest.raises(ValueError, match="holds no sound"):
        load_take(policy, wav)
    with pytest.raises(FileNotFoundError, match="nothere"):
        load_take(policy, tmp_path / "nothere.wav")


def test_a_take_is_continued_in_windows_of_the_models_own_length(policy, tmp_path):
    """Faults: another beginning than the take's; one of the batch alone; windows longer than the model has heard."""
    write_takes(policy, tmp_path / "a")
    take = load_take(policy, tmp_path / "a" / "take-02.wav")
    settings = {"num_frames": 40, "guidance_scale": 3.0, "num_generations": 2}
    clips = write_takes(policy, tmp_path / "b", beginning=take.codes, **settings)
    own = {"window": 17, "overlap": 6, "guidance_scale": 3.0, "num_frames": 40}  # 20 steps, three of delay
    begun, texts = take.codes.repeat(2, 1, 1), PROMPTS[:1] * 2
    expected = extend(policy, begun, texts, processor=tiny_processor(), seed=5, **own)
    for row, clip in enumerate(clips):
        codes = load_take(policy, tmp_path / "b" / clip["file"]).codes
        assert torch.equal(codes, expected.codes[row : row + 1])
        assert torch.equal(codes[..., :12], take.codes)
        # 12 frames, to 23 and to 34 from 6 before, then 6 and 6 more; three of delay, and null rows.
        assert clip["decoder_rows"] == 2 * (20 + 20 + 15)
    with pytest.raises(ValueError, match=r"num_frames=12: the beginning has 12 frames \(0.24 s\) already"):
        write_takes(policy, tmp_path / "c", beginning=take.codes)
    with pytest.raises(ValueError, match="begun with another settings"):
        write_takes(policy, tmp_path / "b", beginning=take.codes.flip(-1), resume=True, **settings)
    assert not (tmp_path / "c").exists()


def test_takes_of_two_models_one_after_the_other(policy, tmp_path):
    """Faults: γ of the first model for both; a folder that goes on with another first model; a first model that
    plays in every window."""
    student = load_policy(tiny_musicgen())
    student.decoder.load_state_dict(tiny_musicgen(seed=1).decoder.state_dict())
    settings = {"first_frames": 5, "first_guidance_scale": 3.0}
    texts, how = PROMPTS[:1] * 3, {"processor": tiny_processor(), "seed": 4} | settings
    for frames, name in ((12, "a"), (140, "b")):
        clips = write_takes(student, tmp_path / name, first=policy, num_frames=frames, **settings)
        begun = hybrid_generate(policy, student, texts, num_frames=min(frames, 125), **how)
        codes, cost = begun.codes, 2 * 8 + min(frames, 125) + 3
        if frames > 125:  # positions of the tiny model
            codes = extend(student, codes, texts, processor=how["processor"], num_frames=140, seed=5).codes
            cost += 50 + 15 + 3
        for row, clip in enumerate(clips):
            assert torch.equal(load_take(policy, tmp_path / name / clip["file"]).codes[0], codes[row])
            assert clip["decoder_rows"] == cost
    with pytest.raises(ValueError, match="begun with another settings"):
        write_takes(student, tmp_path / "a", first=student, resume=True, **settings)
    with pytest.raises(ValueError, match="first_frames=12 must be"):
        write_takes(student, tmp_path / "c", first=policy, first_frames=12)
    assert not (tmp_path / "c").exists()


def test_no_click_where_windows_meet():
    """The energy of sudden steps at the seams lies within 1 dB of that at other frames; decoded one by one it is
    far above."""
    model, texts = load_policy(nano_path()), ["a slow low melody in D minor on a violin"] * 6
    settings = {"processor": load_processor(nano_path()), "guidance_scale": 3.0}
    begun = fast_generate(model, texts, num_frames=75, seed=0, decode=False, **settings).codes
    clips = extend(model, begun, texts, num_frames=165, window=75, seed=1, **settings)
    ends = [75, 120, 165]  # of the windows
    pieces = [decode_codes(model, codes) for codes in clips.codes.tensor_split(ends[:2], dim=-1)]

    def excess(waveforms):
        """dB of the second difference around the seams, above the median over all frames."""
        steps = waveforms.double().diff(dim=-1).diff(dim=-1).square()
        around = torch.stack([steps[:, 640 * t - 16 : 640 * t + 16].mean(1) for t in range(1, 165)])
        decibels = 10 * around.log10()
        return float(decibels[[end - 1 for end in ends[:2]]].mean() - decibels.median())

    assert abs(excess(clips.waveforms)) < 1
    assert excess(torch.cat(pieces, dim=-1)) > 5


def brute_force_points(distances, count):
    chosen = [0]
    while len(chosen) < count:
        others = [point for point in range(len(distances)) if point not in chosen]
        chosen.append(max(others, key=lambda point: min(distances[point][other] for other in chosen)))
    return chosen


@pytest.mark.parametrize("embedder", [CodesEncoder(), WaveEncoder()], ids=["codes", "audio"])
def test_of_many_samples_those_that_differ_most_are_kept(policy, tmp_path, embedder, monkeypatch):
    """Faults: the nearest in place of the farthest; rows of the sound clips taken for rows of all; half the cost."""

    def choose(clips):
        return diverse_subset(clips, 3, embedder)

    settings = {"of": 8, "choose": choose, "batch_size": 3}
    clips = write_takes(policy, tmp_path / "a", PROMPTS[:2], **settings)
    for row, prompt in enumerate(PROMPTS[:2]):
        samples = fast_generate(
            policy,
            prompt,
            processor=tiny_processor(),
            num_frames=12,
            num_generations=8,
            seed=4,
            sample_ids=range(8 * row, 8 * row + 8),
        )
        inputs = samples.codes if embedder.reads == "codes" else samples.waveforms
        unit = embedder.embed(inputs, 3200).double().numpy()
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        distances = 1 - unit @ unit.T
        kept = brute_force_points(distances, 3)
        taken = clips[3 * row : 3 * row + 3]
        assert [clip["sample_id"] - 8 * row for clip in taken] == kept
        assert [clip["decoder_rows"] for clip in taken] == [8 * 15 / 3] * 3
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "0001-take-01.wav").unlink()
    assert write_takes(policy, tmp_path / "b", PROMPTS[:2], resume=True, **settings) == clips
    again, whole = (tmp_path / name / "0001-take-01" for name in "ba")
    assert again.with_suffix(".wav").read_bytes() == whole.with_suffix(".wav").read_bytes()
    assert torch.equal(*(load_file(stem.with_suffix(".safetensors"))["codes"] for stem in (again, whole)))
    manifest = json.loads((tmp_path / "a" / "generations.json").read_text())
    assert manifest["settings"]["of"] == 8 and "sample_id" not in manifest["clips"][0]


def test_broken_clips_are_not_what_differs_most():
    """Fault: white noise and silence are as different as it gets."""
    time = torch.arange(16000) / 16000
    tones = torch.stack([0.3 * torch.sin(2 * torch.pi * pitch * time) for pitch in (220, 221, 440, 880)])
    noise = 0.3 * torch.rand(2, 16000, generator=torch.Generator().manual_seed(0)) - 0.15
    codes = torch.zeros(6, 4, 50, dtype=torch.long)
    clips = Clips(codes, 16000, waveforms=torch.cat([noise, tones]))
    kept = diverse_subset(clips, 3, WaveEncoder())
    assert kept[0] == 2 and set(kept) <= {2, 3, 4, 5}
    assert len(diverse_subset(clips, 5, WaveEncoder())) == 5
    sound = set(validity(clips.waveforms, clips.sampling_rate)["valid"].nonzero()[:, 0].tolist())
    assert 0 < len(sound) < 5 and sound < set(diverse_subset(clips, len(sound) + 1, WaveEncoder()))
    for count, change, said in (
        (7, {}, "at most the number of clips, 6"),
        (2, {"waveforms": None}, "decode=True"),
    ):
        with pytest.raises(ValueError, match=said):
            diverse_subset(Clips(**{**vars(clips), **change}), count, WaveEncoder())
    with pytest.raises(ValueError, match="reads codes of a 3200 Hz codec"):
        diverse_subset(clips, 2, CodesEncoder())
