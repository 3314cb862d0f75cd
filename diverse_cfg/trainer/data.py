"""The prompts of a run and the columns beside them, checked before the first step."""

import inspect
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from datasets import IterableDataset
from datasets.features.features import require_decoding
from transformers import PreTrainedTokenizerBase

from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.policies.policy import require_prompts
from diverse_cfg.prompts import check_column, check_prompts, load_prompts
from diverse_cfg.rewards import keywords

logger = logging.getLogger(__name__)

GIVEN = {
    *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),  # by TRL
    *("num_generations", "sampling_rate", "codes", "waveforms"),  # by this package
}
"""What every reward function is called with, besides the columns of the dataset."""


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What a reward function gets of the dataset: every column but the prompt."""
    return {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}


def prompt_dataset(
    data: Any, tokenizer: PreTrainedTokenizerBase, name: str, reward_funcs: list[Callable]
) -> Any:
    """A dataset with a checked `prompt` column, from a stream or whatever `load_prompts` takes.

    Args:
        data: the prompts, a dict of several sets of them, or None.
        tokenizer: of the text encoder.
        name: of the argument, for messages.
        reward_funcs: may read the other columns. One with audio or pictures is decoded if a function names it
            as a parameter, and left out if none does.

    Raises:
        ValueError: no rows, no prompts, a prompt that is longer than the text encoder takes, or a column that
            a reward function wants and cannot get. In a stream a row raises when it is reached, the first now.
    """
    if data is None:
        return None
    if isinstance(data, Mapping) and "prompt" not in data:
        return {
            key: prompt_dataset(value, tokenizer, f"{name}[{key!r}]", reward_funcs)
            for key, value in data.items()
        }
    if not isinstance(data, IterableDataset):
        dataset = load_prompts(data)
        require_prompts(list(dataset["prompt"]), tokenizer, f"{name}: ")
        return _readable(dataset, dataset.column_names, name, reward_funcs)

    names = data.column_names or list(next(iter(data), {"prompt": None}))
    check_column(names, None, name)

    def check(row: dict[str, Any], index: int) -> bool:
        check_prompts([row.get("prompt")], name, first=index + 1)
        require_prompts([row["prompt"]], tokenizer, f"{name}, row {index + 1}: ")
        return True

    stream = _readable(data, names, name, reward_funcs).filter(check, with_indices=True)
    if next(iter(stream), None) is None:
        raise ValueError(f"{name} is empty: it holds no prompt")
    return stream


def train_prompts(
    data: Any, tokenizer: PreTrainedTokenizerBase, args: CFGDiversityConfig, reward_funcs: list[Callable]
) -> Any:
    """The training prompts, enough of them to fill a generation batch.

    Raises:
        ValueError: none, or fewer than one rollout needs: TRL would drop them all and train nothing.
    """
    if data is None:
        raise ValueError("train_dataset is required: a dataset, a file, or a list of prompts")
    if isinstance(data, Mapping):  # of splits, or of columns
        stream = data.get("train")
        data = stream if isinstance(stream, IterableDataset) else load_prompts(data)
    dataset = prompt_dataset(data, tokenizer, "train_dataset", reward_funcs)
    needed = args.generation_batch_size // args.num_generations
    found = len(list(itertools.islice(dataset, needed)))
    if found < needed:
        raise ValueError(
            f"train_dataset has {found} prompts, but one rollout takes {needed} (generation_batch_size "
            f"{args.generation_batch_size} / num_generations {args.num_generations}): add prompts or lower "
            "the batch"
        )
    return dataset


def _readable(dataset: Any, names: list[str], name: str, reward_funcs: list[Callable]) -> Any:
    """The dataset without the audio and pictures that no reward function reads."""
    there = set(names) - {"prompt"}
    wanted, open_functions = set(), []
    for function in reward_funcs:
        if _is_ours(function):
            continue  # reads the prompt and the audio
        label = getattr(function, "__name__", type(function).__name__)
        named, is_open = keywords(function)
        wanted |= named.keys()
        open_functions += [label] * is_open
        for parameter in named.values():
            if parameter.name in GIVEN & there:
                raise ValueError(
                    f"{name} has a column {parameter.name!r}, and reward function {label!r} asks for "
                    f"{parameter.name}, which the trainer gives: rename or remove the column"
                )
            elif parameter.name not in GIVEN | there and parameter.default is parameter.empty:
                raise ValueError(
                    f"reward function {label!r} asks for {parameter.name}, which is no column of {name} "
                    f"({', '.join(sorted(there)) or 'it has only prompts'}): add the column, or give the "
                    "parameter a default"
                )
    media = [
        column
        for column, feature in (dataset.features or {}).items()
        if require_decoding(feature) and column not in wanted
    ]
    if media and open_functions:
        logger.warning(
            "%s: the columns %s hold audio or pictures and are left out; a reward function that reads one names "
            "it as a parameter",
            name,
            ", ".join(media),
        )
    # A stream decodes what `remove_columns` takes away.
    return dataset.select_columns([column for column in names if column not in media]) if media else dataset


def _is_ours(function: Callable) -> bool:
    code = function if inspect.isroutine(function) else type(function).__call__
    return (getattr(code, "__module__", None) or "").startswith("diverse_cfg.")
