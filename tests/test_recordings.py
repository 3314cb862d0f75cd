"""A user's own recordings: found with captions, turned into codes once, cut into clips."""

import json
import logging

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset

from diverse_cfg import recordings as module
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.recordings import (
    IGNORED,
    CodedRecording,
    Cuts,
    Recording,
    encode_recordings,
    find_recordings,
    split_recordings,
)
from tests.tiny import tiny_musicgen

RATE = 3200  # of the tiny codec, 64 samples a frame


def music(seconds=1.0, rate=RATE, channels=1, seed=0):
    """Noise in bands that change, so that codes change too."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * 90 * np.cumsum(1 + np.sin(3 * time)) / rate)
    audio = 0.2 * tone[:, None] + 0.1 * random.standard_normal((len(time), channels))
    return audio.astype(np.float32)


def write(path, audio, rate=RATE, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def policy():
    """With codebooks where the random encoder's outputs are, so that codes follow the audio."""
    model = tiny_musicgen()
    codec = model.audio_encoder
    with torch.no_grad():
        hidden = codec.encoder(torch.from_numpy(music(10.0)).T[None])[0].T  # [F, D]
    for scale, layer in zip((1.0, 0.5, 0.3, 0.2), codec.quantizer.layers, strict=True):
        noise = torch.randn(16, hidden.shape[1], generator=torch.Generator().manual_seed(1))
        layer.codebook.embed.copy_(scale * hidden.std(0) * noise + (hidden.mean(0) if scale == 1.0 else 0))
    return as_policy(model)


def coded(length, name="a", digest=None, books=4):
    codes = torch.arange(length).expand(books, -1).to(torch.int16)
    return CodedRecording(name, "sad cello", digest or name, codes, {})


# ---- finding ---------------------------------------------------------------------------------------------


def test_captions_lie_beside_the_audio(tmp_path):
    """Faults: a caption of another file, a folder below that is passed over, white space that splits a prompt."""
    write(tmp_path / "a.wav", music(), caption="  sad\n cello ")
    write(tmp_path / "deep" / "b.flac", music())
    (tmp_path / "deep" / "b.json").write_text(json.dumps({"title": "x", "description": "fast flute"}))
    found = find_recordings(tmp_path)
    assert [(recording.audio.name, recording.caption) for recording in found] == [
        ("a.wav", "sad cello"),
        ("b.flac", "fast flute"),
    ]
    assert find_recordings(tmp_path, column="title")[1].caption == "x"
    write(tmp_path / "c.wav", music())
    with pytest.raises(ValueError, match=r"split='test': the folder .* has no splits; leave it out"):
        find_recordings(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"c\.wav has no caption: write it into c\.txt beside it"):
        find_recordings(tmp_path)
    assert find_recordings(tmp_path, caption="a song")[1].caption == "a song"


def test_tables_and_datasets_name_their_audio(tmp_path):
    """Faults: paths relative to the working folder only; AudioCraft's manifests and audio columns refused."""
    path = write(tmp_path / "music" / "a.wav", music())
    table = tmp_path / "music" / "metadata.csv"
    table.write_text("file_name,text\na.wav,sad cello\n")
    for source in (table, tmp_path / "music"):
        [found] = find_recordings(source, column="text")
        assert (found.audio, found.caption) == (path, "sad cello")
    manifest = tmp_path / "data.jsonl"
    manifest.write_text(json.dumps({"path": "music/a.wav", "duration": 1.0, "sample_rate": RATE}) + "\n")
    path.with_suffix(".json").write_text('{"description": "happy drum"}')
    [found] = find_recordings(manifest)
    assert (found.audio, found.caption) == (path, "happy drum")
    dataset = Dataset.from_dict({"audio": [{"bytes": path.read_bytes(), "path": None}], "prompt": ["a song"]})
    [found] = find_recordings(dataset.cast_column("audio", Audio()))
    assert (found.audio, found.caption) == (path.read_bytes(), "a song")
    with pytest.raises(ValueError, match="no column with audio"):
        find_recordings([{"prompt": "a song", "sound": "a.wav"}])
    with pytest.raises(ValueError, match="row 1: path=3 is neither a path"):
        find_recordings([{"prompt": "a song", "path": 3}])


def test_unusable_recordings_are_one_line_with_their_name(tmp_path, policy):
    (tmp_path / "broken.wav").write_bytes(b"RIFF of no use")
    write(tmp_path / "empty.wav", np.zeros((0, 1)))
    write(tmp_path / "short.wav", music(0.01))
    write(tmp_path / "nan.wav", np.full((RATE, 1), np.nan))
    write(tmp_path / "silent.wav", np.zeros((RATE, 1)))
    said = {
        "broken": "no audio that can be read",
        "empty": "is empty",
        "short": "shorter than a frame",
        "nan": "no numbers",
        "silent": "all 1 recordings are silent",
        "gone": "there is no recording",
    }
    for name, message in said.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            encode_recordings([Recording(f"{name}.wav", "a", tmp_path / f"{name}.wav")], policy)
        assert f"{name}.wav" in str(error.value)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="holds no audio"):
        find_recordings(tmp_path / "nothing")


# ---- encoding --------------------------------------------------------------------------------------------


def test_codes_are_those_of_the_audio_itself(tmp_path, policy):
    """Faults: channels swapped or dropped, a file at another rate encoded as it is, silence kept at the ends."""
    mono, stereo = music(), music(channels=2)
    quiet = np.concatenate([np.zeros((640, 1)), mono, np.zeros((1280, 1))])
    paths = {
        "mono": write(tmp_path / "mono.wav", mono),
        "stereo": write(tmp_path / "stereo.wav", stereo),
        "quiet": write(tmp_path / "quiet.wav", quiet),
    }
    found = encode_recordings([Recording(name, "a", path) for name, path in paths.items()], policy)
    expected = {"mono": mono[:, 0], "stereo": stereo.mean(1), "quiet": quiet[:, 0]}
    for recording in found:
        codes = policy.encode(torch.from_numpy(expected[recording.name].astype(np.float32))[None])[0]
        codes = codes[:, 10:60] if recording.name == "quiet" else codes
        assert torch.equal(recording.codes.long(), codes) and len(codes[0].unique()) > 3
    assert found[2].facts["trimmed"] == pytest.approx(0.6)
    two = as_policy(tiny_musicgen(2))
    two.model.audio_encoder = policy.model.audio_encoder
    [sides, same] = encode_recordings(
        [Recording("s", "a", paths["stereo"]), Recording("m", "a", paths["mono"])], two
    )
    for channel in range(2):
        one = policy.encode(torch.from_numpy(stereo[:, channel])[None])[0]
        assert torch.equal(sides.codes[channel::2].long(), one)
    assert torch.equal(same.codes[0::2], same.codes[1::2])


def test_another_rate_is_resampled(tmp_path, policy):
    """Fault: music an octave too high. Twice the rate, the same tune: nearly the same codes."""
    time = np.arange(4 * RATE) / (2 * RATE)
    tune = 0.3 * np.sin(2 * np.pi * (100 + 50 * time) * time)
    fast = write(tmp_path / "fast.wav", tune[:, None], rate=2 * RATE)
    slow = write(tmp_path / "slow.wav", tune[::2, None])
    one, other = encode_recordings([Recording("f", "a", fast), Recording("s", "a", slow)], policy)
    assert one.codes.shape == other.codes.shape
    assert (one.codes == other.codes)[:, 2:-2].float().mean() > 0.9


def test_long_recordings_are_encoded_in_pieces(tmp_path, policy, monkeypatch):
    """Faults: an hour that does not fit into memory; frames lost, doubled or shifted where two pieces meet."""
    path = write(tmp_path / "long.wav", music(9.3))
    whole = policy.encode(torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None])[0]
    monkeypatch.setattr(module, "_PIECE", 2)
    lengths, encode = [], policy.encode
    monkeypatch.setattr(policy, "encode", lambda audio: lengths.append(audio.shape[1]) or encode(audio))
    [found] = encode_recordings([Recording("long", "a", path)], policy, tmp_path / "cache")
    assert max(lengths) == 4 * RATE and len(lengths) > 3
    assert found.codes.shape == whole.shape == (4, 465)
    assert (found.codes.long() == whole).float().mean() > 0.99


def test_codes_are_computed_once(tmp_path, policy, monkeypatch, caplog):
    """Faults: hours of encoding again; codes of another codec, or of a file that was changed since."""
    caplog.set_level(logging.INFO, "diverse_cfg")
    monkeypatch.setenv("DIVERSE_CFG_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.wav", np.clip(8 * music(channels=2), -1, 1), rate=2 * RATE)
    first = encode_recordings([Recording("a.wav", "a", path)], policy)
    assert "recordings: 1, 0.0 min; 1 resampled to 3200 Hz; 1 mixed to mono; 1 clipped (a.wav)" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(policy, "encode", lambda _: pytest.fail("encoded again"))
        again = encode_recordings([Recording("b.wav", "b", path.rename(tmp_path / "b.wav"))], policy)
    assert torch.equal(again[0].codes, first[0].codes) and again[0].caption == "b"
    assert "1 from the cache" in caplog.text
    other = tiny_musicgen()
    [found] = encode_recordings([Recording("b", "b", tmp_path / "b.wav")], as_policy(other))
    assert not torch.equal(found.codes, first[0].codes)
    write(tmp_path / "b.wav", music(seed=1))
    [found] = encode_recordings([Recording("b", "b", tmp_path / "b.wav")], policy)
    assert not torch.equal(found.codes, first[0].codes)


# ---- cutting ---------------------------------------------------------------------------------------------


def test_cuts_depend_on_their_number_alone():
    """Faults: the same place in every epoch, places never drawn, a resumed run that sees other clips."""
    cuts = Cuts([coded(20)], 8, seed=3, text_dropout=0.25)
    assert len(cuts) == 2
    drawn = [cuts[number] for number in range(2000)]
    starts = [int(clip["labels"][0, 0]) for clip in drawn]
    assert set(starts) == set(range(13))
    assert all(
        torch.equal(clip["labels"][2], torch.arange(s, s + 8)) for clip, s in zip(drawn, starts, strict=True)
    )
    assert abs(np.mean([clip["dropped"] for clip in drawn]) - 0.25) < 0.04
    assert torch.equal(cuts[1234]["labels"], drawn[1234]["labels"])
    other = Cuts([coded(20)], 8, seed=4)
    assert [int(other[n]["labels"][0, 0]) for n in range(50)] != starts[:50]
    assert not any(other[number]["dropped"] for number in range(50))


def test_evaluation_has_fixed_windows_and_all_texts():
    cuts = Cuts([coded(21), coded(1000, "b"), coded(5, "c")], 8)
    starts = [int(cuts[number]["labels"][0, 0]) for number in range(len(cuts))]
    assert starts[:2] == [0, 8] and len(starts) == 2 + 8 + 1
    assert starts[2:10] == [8 * (index * 125 // 8) for index in range(8)]
    assert cuts[10]["labels"][1].tolist() == [0, 1, 2, 3, 4, *[IGNORED] * 3]
    assert not any(cuts[number]["dropped"] for number in range(len(cuts)))


def test_recordings_are_held_out_whole():
    """Faults: a copy of a file, or a part of it, in both; a choice that depends on names or on order."""
    recordings = [coded(9, name, digest=name[0]) for name in ("a", "b", "c", "d", "e", "e-copy")]
    train, test = split_recordings(recordings, 0.4, seed=0)
    assert len({r.digest for r in test}) == 2 and not {r.digest for r in test} & {r.digest for r in train}
    assert len(train) + len(test) == 6
    again = split_recordings(recordings[::-1], 0.4, seed=0)[1]
    assert {r.name for r in again} == {r.name for r in test}
    assert split_recordings(recordings, 0.0, seed=0) == (recordings, [])
    with pytest.raises(ValueError, match=r"one recording, a, and held_out=0\.1 wants another"):
        split_recordings(recordings[:1], 0.1, seed=0)
