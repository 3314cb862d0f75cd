"""The recipe of the nano base, on the few notes it makes itself: reading, captions, codes, training loop."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from diverse_cfg.assets import nano_path
from diverse_cfg.nano.attributes import level_of, parse_prompt
from diverse_cfg.prompts import load_prompts

pytestmark = pytest.mark.usefixtures("nano_recipe")


def song_record(name, **changes):
    notes = [[i * 0.5, 0.5, 60 + [0, 2, 4, 5, 7, 9, 11, 12][i % 8]] for i in range(64)]
    record = {
        "id": name,
        "polymeter": False,
        "duplicate_of": None,
        "key_by_signature": {"tonic": 0, "mode": "major"},
        "parts": [{"role": "melody", "notes": notes}],
    }
    return json.dumps(record | changes)


def test_lieder_lines_that_cannot_be_used_are_named(tmp_path):
    """Catches a song that vanishes silently."""
    from notes import read_lieder

    lines = [
        song_record("good"),
        song_record("poly", polymeter=True),
        song_record("again", duplicate_of="good"),
        song_record("short", parts=[{"role": "melody", "notes": [[0, 1, 60]]}]),
        "{broken",
    ]
    path = tmp_path / "songs.jsonl"
    path.write_text("\n".join(lines))
    songs, skipped = read_lieder(path)
    assert [song.id for song in songs] == ["good"]
    assert set(skipped) == {"poly", "again", "short", "line 5"}


def test_notes_that_are_not_there_are_an_error(tmp_path):
    from notes import read_songs

    with pytest.raises(FileNotFoundError, match="MIDI"):
        read_songs(tmp_path / "nothing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no usable song"):
        read_songs(tmp_path / "empty")


def test_midi_folders_are_read_and_broken_files_named(tmp_path):
    """Catches a melody taken from the bass, ticks taken for quarters, and a broken file that stops everything."""
    mido = pytest.importorskip("mido", reason="mido is in the extra `recipes`")
    from notes import read_midi_folder

    midi = mido.MidiFile(ticks_per_beat=240)
    for base in (40, 72):
        track = mido.MidiTrack()
        for step in range(30):
            track.append(mido.Message("note_on", note=base + step % 5, velocity=80, time=0))
            track.append(mido.Message("note_off", note=base + step % 5, time=120))
        midi.tracks.append(track)
    midi.save(tmp_path / "song.mid")
    (tmp_path / "broken.mid").write_bytes(b"MThd nonsense")
    songs, skipped = read_midi_folder(tmp_path)
    assert [song.id for song in songs] == ["song.mid"]
    assert list(skipped) == ["broken.mid"]
    assert songs[0].notes[:, 2].min() == 72
    assert songs[0].notes[1].tolist() == [0.5, 0.5, 73]


def test_skyline_keeps_the_top_note_and_cuts_overlaps():
    from notes import skyline

    chord = np.array([[0, 4, 60], [0, 4, 67], [1, 1, 64.0]])
    assert skyline(chord).tolist() == [[0, 1, 67], [1, 1, 64]]


def test_splits_are_disjoint_by_song_and_stable():
    """Catches a split that depends on the order or number of songs."""
    from notes import SPLITS, split_of

    drawn = [split_of(f"song {i}") for i in range(2000)]
    assert drawn == [split_of(f"song {i}") for i in range(2000)]
    for split, share in SPLITS.items():
        assert abs(drawn.count(split) / 2000 - share) < 0.03


def test_captions_name_only_what_is_known_and_the_tokenizer_reads_them():
    """Catches an attribute invented by a template, and a word that falls to <unk>."""
    from captions import caption
    from language_model import build_tokenizer

    from diverse_cfg.nano.attributes import ATTRIBUTES

    tokenizer, rng = build_tokenizer(), np.random.default_rng(0)
    for _ in range(200):
        full = {name: classes[rng.integers(len(classes))] for name, classes in ATTRIBUTES.items()}
        known = {
            name: (value if rng.random() < 0.7 or name == "instrument" else None)
            for name, value in full.items()
        }
        assert parse_prompt(caption(known)) == {k: v for k, v in known.items() if v is not None}
        text = caption(known, rng)
        said = parse_prompt(text)
        assert said.items() <= known.items()
        assert said["instrument"] == known["instrument"]
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_open_prompts_are_those_of_the_seed():
    """Catches shipped prompts that nobody can make again, whose wordings the tokenizer cannot read, or whose level is
    not what the prompt names."""
    from language_model import build_tokenizer
    from open_prompts import ASSETS, PER_LEVEL, open_prompts

    tokenizer, found = build_tokenizer(), open_prompts(0)
    for split, count in PER_LEVEL.items():
        lines = (ASSETS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert rows == found[split]
        assert Counter(row["level"] for row in rows) == dict.fromkeys((1, 2, 3, 4), count)
        for row in rows:
            assert (
                parse_prompt(row["prompt"]) == row["attributes"] and level_of(row["prompt"]) == row["level"]
            )
            assert tokenizer.unk_token_id not in tokenizer(row["prompt"]).input_ids
        if split != "train":
            assert len({row["prompt"] for row in rows}) == len(rows)
            assert [row["level"] for row in rows[:8]] == [1, 2, 3, 4] * 2, (
                "the first prompts are of all levels"
            )
        for level, sets in ((2, 3), (3, 3)):
            named = Counter(frozenset(row["attributes"]) for row in rows if row["level"] == level)
            assert len(named) == sets and max(named.values()) - min(named.values()) <= 1


def test_no_open_prompt_is_in_two_splits():
    """Catches a student that is judged on what it was trained on; of an instrument alone only wordings can differ."""
    from open_prompts import open_prompts

    splits = list(open_prompts(0).values())
    for first, second in combinations(splits, 2):
        assert not {row["prompt"] for row in first} & {row["prompt"] for row in second}
        meanings = [
            {tuple(row["attributes"].items()) for row in rows if row["level"] > 1} for rows in (first, second)
        ]
        assert not meanings[0] & meanings[1]


def test_four_attributes_of_open_prompts_are_the_prompts_that_were_there_before():
    from open_prompts import open_prompts

    for split in ("validation", "test"):
        before = [row["prompt"] for row in load_prompts(nano_path("prompts"), split=split)]
        level_4 = [row["prompt"] for row in open_prompts(0)[split] if row["level"] == 4]
        assert level_4 == before[: len(level_4)]


def test_attributes_are_those_of_the_clip_not_of_the_recording():
    """Catches a clip described by the notes of its neighbour."""
    from captions import attributes_of

    slow = [[t, 1.0, 60] for t in (0.0, 1.0, 2.0)]
    fast = [[3.2 + 0.2 * i, 0.2, 76] for i in range(15)]
    notes = np.array(slow + fast)
    first, second = (attributes_of(notes, "piano", start) for start in (0.0, 3.2))
    assert (first["tempo"], first["register"]) == ("slow", "middle")
    assert (second["tempo"], second["register"]) == ("fast", "high")
    assert first["key"] is None  # three equal notes have no key


def two_recordings():
    """A slow low violin, then a quick high trumpet: pitches and onsets that cannot be mistaken for each other."""
    from render import Recording

    slow = np.array([[0.5, 2.0, 57.0], [3.5, 2.0, 57.0]])
    quick = np.array([[0.25 + 0.5 * i, 0.25, 81.0] for i in range(11)])
    return [Recording("one", "violin", 90, slow), Recording("two", "trumpet", 90, quick)]


def test_a_shard_s_midi_plays_each_recording_in_its_own_time(tmp_path):
    """Catches notes that drift into the next recording, or that go on sounding in it."""
    import mido
    from render import GAP_SECONDS, RECORDING_SECONDS, _midi_bytes

    _midi_bytes(two_recordings(), tmp_path / "shard.mid")
    now, on, off = 0.0, [], []
    for message in mido.MidiFile(tmp_path / "shard.mid"):
        now += message.time
        if message.type in ("note_on", "note_off"):
            (on if message.type == "note_on" else off).append((round(now, 3), message.note))
    second = RECORDING_SECONDS + GAP_SECONDS
    assert on == [(0.5, 57), (3.5, 57)] + [(round(second + 0.25 + 0.5 * i, 3), 81) for i in range(11)]
    assert len(off) == len(on) and max(time for time, note in off if note == 57) < RECORDING_SECONDS


def test_rendered_audio_has_the_notes_and_the_level(tmp_path):
    """With the real synthesiser. Catches a wrong sampling rate, channel, pitch or cut between recordings."""
    from build import BuildConfig
    from render import SAMPLE_RATE, render_shard, require_fluidsynth

    soundfont = BuildConfig().soundfont
    try:
        require_fluidsynth(soundfont)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from diverse_cfg.nano.rules import pitches

    audio = render_shard((two_recordings(), soundfont)).astype(np.float32) / 32767
    assert np.abs(20 * np.log10(np.sqrt((audio**2).mean(1))) + 20).max() < 0.5
    found = pitches(torch.from_numpy(audio), SAMPLE_RATE)
    for row, note in zip(found, (57, 81), strict=True):
        voiced = row[np.isfinite(row)]
        cents = 1200 * np.abs(np.log2(voiced / (440 * 2 ** ((note - 69) / 12))))
        assert (cents < 50).mean() > 0.8
    assert np.abs(audio[0, : round(0.45 * SAMPLE_RATE)]).max() < 0.02, "before the first note it is silent"


def test_recipe_with_an_unknown_key_or_without_fluidsynth_stops_at_once(tmp_path, monkeypatch, capsys):
    import build

    recipe = tmp_path / "build.yaml"
    recipe.write_text("sed: 1\n")
    assert build.main(["--config", str(recipe)]) == 2
    assert "unknown key(s) sed" in capsys.readouterr().err
    recipe.write_text("seed: 1.5\n")
    assert build.main(["--config", str(recipe)]) == 2
    assert "seed=1.5 must be an integer" in capsys.readouterr().err
    recipe.write_text(f"work: {tmp_path / 'work'}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main(["--config", str(recipe), "--stages", "render"]) == 2
    assert "apt-get install fluidsynth" in capsys.readouterr().err


def test_codes_of_the_features_are_those_of_the_codec_s_quantizer():
    """Catches another order of the residual stages than EnCodec's own."""
    from codec import DIM, build_codec, encode_features

    generator = torch.Generator().manual_seed(0)
    codebooks = (
        torch.randn(4, 512, DIM, generator=generator) * torch.tensor([1.0, 0.5, 0.3, 0.2])[:, None, None]
    )
    latent = torch.randn(20, DIM, generator=generator)
    codec = build_codec({"codebooks": codebooks})
    want = codec.quantizer.encode(latent.T[None])  # [4, 1, 20]
    assert torch.equal(encode_features(latent, codebooks).T, want[:, 0])


def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path):
    """Catches lost optimiser state, averages or randomness; and a longer schedule that starts inside the decay."""
    from training import Schedule, train

    def run(folder, stop_after=None, steps=12):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss_of_step(step):
            if stop_after is not None and step == stop_after:
                raise KeyboardInterrupt
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()

        schedule = Schedule(0.05, steps, warmup=2, evaluate_every=2)
        train("line", model, loss_of_step, lambda: {"norm": model.weight.norm().item()}, schedule, folder)
        return model.weight.detach().clone()

    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop_after=7)
    assert torch.equal(run(tmp_path / "b"), straight)
    run(tmp_path / "b", steps=20)
    steps = [
        int(float(line.split(",")[0])) for line in (tmp_path / "b" / "line.csv").read_text().splitlines()[1:]
    ]
    assert steps == list(
        range(2, 21, 2)
    )  # it went on from step 6, the last before the decay; each row is there once


def test_vocoder_initialisation_sets_the_spread_of_every_layer():
    """Catches convolutions left at their default scale, with which the loss starts at 49."""
    from codec import DIM, build_codec, initialise_by_data

    torch.manual_seed(0)
    decoder = build_codec({"codebooks": torch.randn(4, 512, DIM)}).decoder
    latent = torch.randn(4, DIM, 10)
    initialise_by_data(decoder, latent)
    assert decoder(latent).std().item() == pytest.approx(0.05, rel=0.2)
