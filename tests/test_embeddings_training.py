"""Recordings, chunks and the training of an embedder on them."""

import json

import numpy as np
import pytest
import soundfile
import torch

from diverse_cfg.embeddings import load_embedder
from diverse_cfg.embeddings.contrastive import ContrastiveConfig, semi_hard_triplet_loss, train_contrastive
from diverse_cfg.embeddings.recordings import AudioRecordings, CodeRecordings, _disjoint_starts
from diverse_cfg.embeddings.training import SIZES, _draw_groups, _split, encoder_config, train_embedder

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "dim": 8, "dropout": 0.0}
CODEC = {"sampling_rate": 3200, "frame_rate": 50.0, "codebook_size": 12}


def write_tone(path, frequency, rate=3200, seconds=1.0, channels=1):
    time = np.arange(int(rate * seconds)) / rate
    audio = 0.3 * np.sin(2 * np.pi * frequency * time)
    soundfile.write(path, np.stack([audio] * channels, axis=1), rate)
    return path


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- recordings ----------------------------------------------------------------------------------


def test_chunks_never_overlap_and_reach_everywhere():
    """Faults: a positive that shares samples with its anchor, which is told by them; places never drawn."""
    drawn = generator()
    found = {tuple(_disjoint_starts(9, 3, drawn)) for _ in range(2000)}
    assert found == {(a, b) for a in range(7) for b in range(7) if abs(a - b) >= 3}
    assert {tuple(_disjoint_starts(6, 3, drawn)) for _ in range(20)} == {(0, 3), (3, 0)}


def test_audio_is_read_where_the_chunks_are_at_one_rate_and_mono(tmp_path):
    """Faults: chunks of the beginning only, a file at another rate played too fast, a channel left out."""
    write_tone(tmp_path / "a.wav", 200)
    write_tone(tmp_path / "b.wav", 200, channels=2)
    write_tone(tmp_path / "c.flac", 200, rate=6400)
    recordings = AudioRecordings.from_folder(tmp_path, chunk_seconds=0.5)
    assert (len(recordings), recordings.sampling_rate, recordings.prompts) == (3, 3200, [None] * 3)
    first, second = recordings.pairs([0, 1, 2], generator())
    assert first.shape == second.shape == (3, 1600)
    # 200 Hz wherever it is read: the spectrum's peak of half a second is in bin 100.
    assert torch.fft.rfft(first).abs().argmax(1).tolist() == [100] * 3
    whole = torch.from_numpy(soundfile.read(tmp_path / "a.wav", dtype="float32")[0])
    halves = [tuple(whole.split(1600)), tuple(whole.split(1600))[::-1]]
    pair = tuple(part[0] for part in recordings.pairs([0], generator(3)))
    assert any(all(torch.equal(x, y) for x, y in zip(pair, half, strict=True)) for half in halves)


def test_what_generate_wrote_brings_its_prompts(tmp_path):
    clips = [{"file": f"{index}.wav", "prompt": "ab"[index % 2]} for index in range(4)]
    for index, clip in enumerate(clips):
        write_tone(tmp_path / clip["file"], 100 + index)
    (tmp_path / "generations.json").write_text(json.dumps({"clips": clips}))
    assert AudioRecordings.from_folder(tmp_path).prompts == ["a", "b", "a", "b"]
    (tmp_path / "2.wav").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 4 clips, such as 2\.wav"):
        AudioRecordings.from_folder(tmp_path)


def test_unusable_recordings_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        AudioRecordings.from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no audio"):
        AudioRecordings.from_folder(tmp_path)
    write_tone(tmp_path / "long.wav", 200, seconds=3.0)
    write_tone(tmp_path / "short.wav", 200, seconds=0.4)
    with pytest.raises(ValueError, match=r"short\.wav lasts 0\.40 s: too short"):
        AudioRecordings.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 2 .* such as .*short\.wav .*at most 0\.20 s"):
        AudioRecordings.from_folder(tmp_path, chunk_seconds=1.0)
    (tmp_path / "broken.wav").write_bytes(b"RIFF of no use")
    with pytest.raises(ValueError, match=r"broken\.wav is no audio"):
        AudioRecordings.from_folder(tmp_path)


def test_codes_of_another_codec_are_refused():
    with pytest.raises(ValueError, match="from 0 to 12 are not of a codec with 12"):
        CodeRecordings([torch.tensor([[0, 12] * 20])], **CODEC)
    with pytest.raises(ValueError, match=r"different numbers of codebooks: \[1, 2\]"):
        CodeRecordings([torch.zeros(1, 40).long(), torch.zeros(2, 40).long()], **CODEC)


# ---- training ------------------------------------------------------------------------------------


def slow_triplet(first, second, groups, margin):
    vectors = np.concatenate([first, second]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    count, total = len(first), 0.0
    for anchor in range(2 * count):
        positive = 1 - vectors[anchor] @ vectors[(anchor + count) % (2 * count)]
        others = [
            1 - vectors[anchor] @ vectors[j]
            for j in range(2 * count)
            if j % count != anchor % count and groups[j % count] == groups[anchor % count]
        ]
        farther = [distance for distance in others if distance > positive]
        total += max(0.0, positive - (min(farther) if farther else max(others)) + margin)
    return total / (2 * count)


def test_negatives_of_the_own_group_only():
    """Catches a negative from another prompt; a group without negatives must not become an infinite loss."""
    first, second = torch.randn(7, 5, generator=generator()), torch.randn(7, 5, generator=generator(1))
    groups = torch.tensor([4, 4, 9, 9, 9, 4, 9])
    got = semi_hard_triplet_loss(first, second, 0.3, groups).item()
    assert got == pytest.approx(slow_triplet(first.numpy(), second.numpy(), groups.tolist(), 0.3), abs=1e-5)
    with pytest.raises(ValueError, match="no negatives"):
        semi_hard_triplet_loss(first, second, 0.3, torch.tensor([4, 4, 9, 9, 9, 4, 5]))


def test_prompts_are_held_out_whole_and_groups_fill_a_batch():
    """Catches measuring on prompts that were learned from, and a recording twice in a batch."""
    groups = [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10]]
    train, test = _split(groups, 0.15, generator())
    assert sorted(train + test) == groups and len(test) == 1
    train, test = _split([[0, 1, 2, 3, 4, 5]], 0.4, generator())
    assert sorted(train + test) == [[index] for index in range(6)] and len(test) == 3
    chosen, of_group = _draw_groups(groups, 7, generator())
    assert len(set(chosen)) == len(chosen) <= 7
    assert all(index in groups[number] for index, number in zip(chosen, of_group, strict=True))
    assert min(of_group.count(number) for number in of_group) >= 2


def recordings_of_styles(repeats=3):
    """Six prompts × four styles: codebook 0 tells the prompt, codebook 1 the style, with noise on both."""
    noise = generator(9)
    clips, prompts = [], []
    for prompt in range(6):
        for style in list(range(4)) * repeats:
            book = 2 * torch.tensor([[prompt], [style]]) + torch.randint(0, 2, (2, 32), generator=noise)
            clips.append(book)
            prompts.append(f"prompt {prompt}")
    return CodeRecordings(clips, prompts=prompts, **CODEC)


def test_an_embedder_of_what_prompts_leave_open():
    """Fault: same-prompt negatives that change nothing. Two prompts in one style must be nearly alike."""
    config = ContrastiveConfig(reads="codes", num_codebooks=2, codebook_size=12, patch=2, **SMALL)
    settings = {"steps": 150, "batch_size": 24, "learning_rate": 3e-3, "held_out": 0.1, "device": "cpu"}
    by_prompt = {}
    for negatives in ("any", "same-prompt"):
        # One clip per style and prompt: with more, a clip's own style would be among its negatives.
        trained = train_embedder(recordings_of_styles(1), config, negatives=negatives, **settings)
        codes = torch.stack([2 * torch.tensor([[p] * 16, [s] * 16]) for p in range(6) for s in range(4)])
        vectors = torch.nn.functional.normalize(trained.embedder.embed(codes), dim=1).view(6, 4, -1)
        between_prompts = (1 - (vectors[:, None] * vectors[None]).sum(-1)).mean()
        between_styles = (1 - (vectors[:, :, None] * vectors[:, None]).sum(-1)).mean()
        by_prompt[negatives] = float(between_prompts / between_styles)
        assert trained.retrieval > 2 * trained.chance
    assert by_prompt["same-prompt"] < 0.4 * by_prompt["any"]


def test_same_seed_same_encoder():
    config = ContrastiveConfig(reads="codes", num_codebooks=2, codebook_size=12, patch=2, **SMALL)
    first, again, other = (
        train_embedder(recordings_of_styles(), config, steps=3, batch_size=8, seed=seed, device="cpu")
        for seed in (0, 0, 1)
    )
    codes = recordings_of_styles().pairs(range(4), generator())[0]
    assert torch.equal(first.embedder.embed(codes), again.embedder.embed(codes))
    assert not torch.equal(first.embedder.embed(codes), other.embedder.embed(codes))
    assert first.retrieval == again.retrieval


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": "none"}, "negatives='none' must be one of any, same-prompt"),
        ({"steps": 0}, "steps=0"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"negatives": "same-prompt"}, "at least two prompts with several recordings"),
        ({}, "2 recordings are too few"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    recordings = CodeRecordings([torch.zeros(2, 40).long()] * 2, **CODEC)
    with pytest.raises(ValueError, match=message):
        train_embedder(recordings, encoder_config(recordings), device="cpu", **settings)


def test_an_encoder_that_is_not_finite_is_no_result():
    """Catches the last step, after which no loss is computed."""
    config = ContrastiveConfig(reads="codes", num_codebooks=2, codebook_size=12, patch=2, **SMALL)
    recordings = recordings_of_styles()
    for steps, message in ((1, "the last step made weights inf or nan"), (2, "the loss is nan at step 1")):
        with pytest.raises(FloatingPointError, match=f"{message}.*lower learning_rate=inf"):
            train_contrastive(
                config,
                lambda batch, generator: recordings.pairs(range(batch), generator),
                steps=steps,
                batch=4,
                learning_rate=float("inf"),
                device="cpu",
            )


@pytest.mark.parametrize("size", SIZES)
def test_encoders_fit_their_recordings(size, tmp_path):
    """Catches a mel filter bank that a low rate cannot hold, and heads that do not divide the width."""
    write_tone(tmp_path / "a.wav", 200, rate=3200, seconds=1.0)
    recordings = AudioRecordings.from_folder(tmp_path)
    from diverse_cfg.embeddings.contrastive import ContrastiveEmbedder, ContrastiveEncoder

    embedder = ContrastiveEmbedder(ContrastiveEncoder(encoder_config(recordings, size)), device="cpu")
    embedder.save_pretrained(tmp_path / "encoder")
    assert torch.isfinite(
        load_embedder(tmp_path / "encoder").embed(recordings.pairs([0], generator())[0])
    ).all()
