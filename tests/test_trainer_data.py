"""What enters a run beside the model: prompts of every kind, the columns beside them, and the rewards' own
demands, each refused before the first step or harmless."""

import functools
import logging

import pytest
import torch
import trl
from datasets import Audio, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from packaging.version import Version

from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer
from diverse_cfg.trainer.setup import GIVEN, check_reward_funcs, prompt_dataset, train_prompts
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor, tiny_tokenizer
from tests.training import CodeEmbedder, losses, tiny_args

SET = Dataset.from_dict({"prompt": PROMPTS})
STREAMS = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.9"), reason="TRL refuses streams before 1.9"
)


def build(folder, dataset, *reward_funcs, **settings) -> CFGDiversityTrainer:
    return CFGDiversityTrainer(
        tiny_musicgen(),
        [DiversityReward(CodeEmbedder()), *reward_funcs],
        tiny_args(folder, max_steps=1, **settings),
        train_dataset=dataset,
        processing_class=tiny_processor(),
    )


# ---- columns -------------------------------------------------------------------------------------------


def test_columns_whose_names_are_taken_change_nothing(tmp_path):
    """Faults: TypeError at step 1; TRL's words about pictures; a column in the place of the audio. And a TRL
    that hands over more than is known here."""
    seen = {}

    def free(**rest):
        seen.update(rest)
        return [0.0] * len(rest["prompts"])

    free_names = ["image", "images", "tools", "environments", "completion", "style"]
    taken = [*sorted(GIVEN), *free_names]
    dataset = Dataset.from_dict({"prompt": PROMPTS} | {name: ["mine"] * 4 for name in taken})
    trainer = build(tmp_path / "all", dataset, free)
    trainer.train()
    assert set(seen) == GIVEN | set(free_names)
    assert all(seen[name] == ["mine"] * 8 for name in free_names)
    assert [name for name in GIVEN if seen[name] == ["mine"] * 8] == []
    alone = build(tmp_path / "alone", SET, lambda prompts, **_: [0.0] * len(prompts))
    alone.train()
    assert losses(trainer) == losses(alone)


class Scorer:
    def __call__(self, prompts, *, sampling_rate, **_):
        return [0.0] * len(prompts)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset['easy']"])
@pytest.mark.parametrize(
    ("function", "column", "message"),
    [
        (
            lambda prompts, codes, **_: [],
            "codes",
            "has a column 'codes', and reward function '<lambda>' asks",
        ),
        (Scorer(), "sampling_rate", "column 'sampling_rate', and reward function 'Scorer' asks"),
        (lambda prompts, log_metric=None, **_: [], "log_metric", "column 'log_metric'.*rename or remove"),
        (functools.partial(lambda style, prompts, **_: [], waveforms=None), "x", "'partial' asks for style"),
        (lambda prompts, completions, key: [], "style", r"asks for key, which is no column of .* \(style\)"),
    ],
)
def test_columns_that_a_reward_function_cannot_be_given_are_refused(name, function, column, message):
    """Fault: a TypeError out of the first rollout, or out of the first evaluation after hours."""
    dataset = SET.add_column(column, ["x"] * 4)
    for data in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=message) as error:
            prompt_dataset(data, tiny_tokenizer(), name, [function])
        assert name in str(error.value)


def test_our_own_rewards_never_read_a_column():
    dataset = SET.add_column("sampling_rate", [16_000] * 4)
    assert (
        len(prompt_dataset(dataset, tiny_tokenizer(), "train_dataset", [DiversityReward(CodeEmbedder())]))
        == 4
    )


def test_audio_that_nobody_reads_is_not_decoded(tmp_path, caplog):
    """Fault: a set with recordings needs a decoder of audio, which is not there, to train on its captions."""
    broken = [{"path": None, "bytes": b"no audio"}] * 4
    dataset = SET.add_column("audio", broken).cast_column("audio", Audio())
    build(tmp_path, dataset).train()
    assert "left out" not in caplog.text

    def reward(prompts, **columns):
        return [0.0] * len(prompts)

    for data in (dataset, dataset.to_iterable_dataset()):
        caplog.clear()
        kept = prompt_dataset(data, tiny_tokenizer(), "train_dataset", [reward])
        assert "columns audio hold audio or pictures and are left out" in caplog.text
        assert list(next(iter(kept))) == ["prompt"]
        named = [lambda prompts, audio: [], reward]
        assert "audio" in prompt_dataset(dataset, tiny_tokenizer(), "train_dataset", named).column_names


# ---- prompts -------------------------------------------------------------------------------------------


def stream(*rows) -> IterableDataset:
    """Without known columns, as a generator's are."""
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (stream(), "train_dataset is empty"),
        (stream({"caption": "a"}), "train_dataset has no column 'prompt', only 'caption'"),
        (stream({"prompt": ""}, {"prompt": "a"}), "train_dataset, row 1: empty prompt"),
        (stream({"prompt": "a"}, {"prompt": None}), "train_dataset, row 2: a prompt is a string, found None"),
        (stream({"prompt": "a"}, {"caption": "b"}), "train_dataset, row 2: a prompt is a string, found None"),
        (stream({"prompt": "a " * 600}), "train_dataset, row 1: prompt 0 has 601 tokens, .* takes 512"),
        (stream({"prompt": "a"}), "train_dataset has 1 prompts, but one rollout takes 2"),
        (DatasetDict(test=SET), "the DatasetDict has the splits test, not 'train'"),
        ({"test": stream()}, "the dict has the splits test, not 'train'"),
        (
            ["a", "b" * 40_000],
            "train_dataset: prompt 1 has 40002 tokens, the text encoder takes 512: shorten it",
        ),
    ],
)
def test_bad_prompts_are_refused_before_the_first_step(tmp_path, data, message):
    """Faults: a bare KeyError; success after no step; the names of splits counted as prompts; 2.7 GB for one
    prompt."""
    with pytest.raises(ValueError, match=message):
        train_prompts(data, tiny_tokenizer(), tiny_args(tmp_path), [])


@pytest.mark.parametrize(
    "data",
    [
        DatasetDict(test=SET.select([0]), train=SET),
        IterableDatasetDict({"train": SET.to_iterable_dataset()}),
        {"prompt": PROMPTS, "style": ["x"] * 4},
        stream(*SET),
    ],
    ids=lambda data: type(data).__name__,
)
def test_prompts_of_every_container_train(tmp_path, data):
    found = train_prompts(data, tiny_tokenizer(), tiny_args(tmp_path), [])
    assert [row["prompt"] for row in found] == PROMPTS


def test_evaluation_sets_are_checked_by_name():
    data = {"easy": SET.to_iterable_dataset(), "hard": stream({"prompt": " "})}
    with pytest.raises(ValueError, match=r"eval_dataset\['hard'\], row 1: empty prompt"):
        prompt_dataset(data, tiny_tokenizer(), "eval_dataset", [])


@STREAMS
def test_a_row_of_a_stream_is_checked_when_it_comes(tmp_path):
    """Fault: only the beginning of a stream is looked at."""
    rows = stream(*({"prompt": prompt} for prompt in [*PROMPTS, " "]))
    with pytest.raises(ValueError, match="train_dataset, row 5: empty prompt"):
        build(tmp_path, rows).train()


@STREAMS
def test_a_run_without_a_step_is_no_success(tmp_path):
    """Fault: a stream that can be read once is empty when training begins."""
    trainer = build(tmp_path, stream(*SET))
    trainer.train_dataset = stream()
    with pytest.raises(ValueError, match=r"no step was made.*must start anew"):
        trainer.train()


# ---- rewards -------------------------------------------------------------------------------------------


def test_a_pairwise_reward_is_built_like_ours(tmp_path):
    """Fault: AttributeError on what only the diversity reward has."""

    class Half:
        pairwise = True
        embedder = CodeEmbedder()

        def __call__(self, prompts, **_):
            return [0.0] * len(prompts)

    def bare(prompts, **_):
        return [0.0] * len(prompts)

    bare.pairwise = True
    for function, name in ((bare, "bare"), (Half(), "Half")):
        with pytest.raises(
            ValueError, match=f"'{name}' is pairwise, and so needs an embedder.*DiversityReward"
        ):
            check_reward_funcs(function, tiny_args(tmp_path), None)


def test_rewards_that_train_nothing_are_named(tmp_path, caplog):
    def mine(prompts, **_):
        return [0.0] * len(prompts)

    for source, warns in (("teacher", True), ("student", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_reward_funcs([mine], tiny_args(tmp_path, rollout_source=source, diversity_coef=0.0), None)
        assert ("the rewards of mine are logged and train nothing" in caplog.text) == warns


def test_the_table_of_completions_shows_the_advantages_that_are_applied(tmp_path, capsys):
    """Fault: it shows TRL's, of the unweighted sum and without the pairwise estimator."""
    trainer = build(tmp_path, SET, log_completions=True, diversity_codebooks=2, steps_per_generation=2)
    kept, log = [], trainer._log_advantages
    trainer._log_advantages = lambda advantages: (kept.append(advantages), log(advantages))
    trainer.train()
    shown = torch.tensor(list(trainer._logs["advantages"]))
    torch.testing.assert_close(shown, kept[-1].mean(dim=(1, 2)))
    assert len(shown) == 16 and shown.abs().max() > 1.0
    rewards = torch.tensor(list(trainer._logs["rewards"]["diversity"])).view(-1, 4)
    # β = 5 on half of the codebooks, times the estimator's 2·G / (G − 2).
    wanted = 5 * 0.5 * 4 * (rewards - rewards.mean(1, keepdim=True))
    torch.testing.assert_close(shown, wanted.flatten(), rtol=1e-4, atol=1e-5)
