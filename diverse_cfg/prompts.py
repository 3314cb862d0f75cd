"""Prompt datasets: the only data that on-policy training needs.

A source is a Hub dataset id, a local folder, or one file (`.csv`, `.json`, `.jsonl`, `.parquet`, `.txt`, the
text formats also `.gz`). What comes back always has a `prompt` column of non-empty strings; the other columns
are kept, because TRL hands them to the reward functions. An AudioCraft manifest (one audio file per line,
captions in a JSON file beside each audio file) is such a file too.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = (".csv", ".json", ".jsonl", ".parquet", ".txt")
# Columns that usually hold a caption; suggested, never guessed.
_CAPTION_COLUMNS = ("caption", "text", "description")
_SPLITS = ("train", "validation", "valid", "dev", "test", "eval")


def load_prompts(
    source: str | Path | Dataset | Sequence[str], *, split: str = "train", column: str | None = None
) -> Dataset:
    """Load prompts from wherever they are into a dataset with a `prompt` column.

    Args:
        source: Hub dataset id, folder, file, ready dataset, or a list of strings.
        split: which split of a Hub dataset, a saved `DatasetDict` or a folder with one file per split.
        column: the column that holds the prompts (e.g. "caption"); None asks for "prompt".

    Returns:
        A `datasets.Dataset`; the chosen column is called `prompt`, the others keep their names.

    Raises:
        FileNotFoundError: the path, or the split's file in the folder, does not exist.
        ValueError: unknown format, unreadable row, no such column, or an empty prompt (with its row number).
    """
    from datasets import Dataset

    if isinstance(source, Dataset):
        return _with_prompt_column(source, column, "the dataset")
    if not isinstance(source, str | Path):
        texts = [{"prompt": text} for text in source]
        return _with_prompt_column(_from_rows(texts, "the list"), column, "the list")
    path = Path(source).expanduser()
    if path.is_dir():
        dataset = _from_folder(path, split, column)
    elif path.is_file():
        dataset = _from_file(path, column)
    elif _looks_like_path(str(source)):
        raise FileNotFoundError(f"no prompt file or folder {str(source)!r}")
    else:
        dataset = _from_hub(str(source), split)
    return _with_prompt_column(dataset, column, repr(str(source)))


def _looks_like_path(source: str) -> bool:
    """A Hub id has one slash at most and none of our file endings."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or _format(Path(source)) is not None


def _format(path: Path) -> str | None:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] == ".gz":
        suffixes = suffixes[:-1]
    ending = suffixes[-1].lower() if suffixes else ""
    return ending if ending in _FORMATS else None


def _from_hub(name: str, split: str) -> Dataset:
    if name == "nano":
        raise FileNotFoundError(
            'there is no prompt file or folder nano; in Python use diverse_cfg.nano_path("prompts")'
        )
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(name, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a local file nor a reachable Hub dataset: {error}"
        ) from error
    assert isinstance(dataset, Dataset)  # a split was named, so it is neither a dict of splits nor a stream
    return dataset


def _from_folder(folder: Path, split: str, column: str | None) -> Dataset:
    from datasets import Dataset, DatasetDict, load_from_disk

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = load_from_disk(str(folder))
        if isinstance(saved, Dataset):
            return saved
        assert isinstance(saved, DatasetDict)
        if split not in saved:
            raise ValueError(f"{folder} has the splits {', '.join(map(str, saved))}, not {split!r}")
        return saved[split]
    files = sorted(path for path in folder.iterdir() if path.is_file() and _format(path))
    chosen = [path for path in files if path.name.split(".")[0] == split]
    if not chosen and len(files) == 1 and files[0].name.split(".")[0] not in _SPLITS:
        chosen = files  # a folder with a single file needs no split names
    if len(chosen) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise FileNotFoundError(
            f"{folder} needs one prompt file named after the split ({split}.txt, {split}.csv, {split}.jsonl, "
            f"…); prompt files there: {found}"
        )
    return _from_file(chosen[0], column)


def _from_file(path: Path, column: str | None) -> Dataset:
    from datasets import Dataset

    ending = _format(path)
    if ending is None:
        raise ValueError(
            f"{path}: unknown prompt format; use one of {', '.join(_FORMATS)} (text formats may be .gz)"
        )
    if ending == ".parquet":
        dataset = Dataset.from_parquet(str(path))
        assert isinstance(dataset, Dataset)
        return dataset
    text = _read_text(path)
    if ending == ".txt":
        rows: list[dict[str, Any]] = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    elif ending == ".csv":
        rows = _csv_rows(text, path)
    else:
        rows = _json_rows(text, path, lines=ending == ".jsonl")
    if rows and _is_audiocraft_manifest(rows[0]):
        rows = _audiocraft_rows(rows, path, column)
    return _from_rows(rows, str(path))


def _read_text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _csv_rows(text: str, path: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {reader.line_num}: {_columns(row)} cells do not match the header")
        rows.append(row)
    return rows


def _columns(row: dict) -> int:
    extra = row.get(None) or []
    return sum(value is not None for name, value in row.items() if name is not None) + len(extra)


def _json_rows(text: str, path: Path, *, lines: bool) -> list[dict[str, Any]]:
    if lines:
        items = [
            _json(line, f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    else:
        items = _json(text, str(path))
        if not isinstance(items, list):
            raise ValueError(
                f"{path} must hold a list of prompts or of objects, not a {type(items).__name__}"
            )
    rows = [{"prompt": item} if isinstance(item, str) else item for item in items]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number}: expected a string or an object, found {type(row).__name__}"
            )
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def _is_audiocraft_manifest(row: dict) -> bool:
    return {"path", "duration", "sample_rate"} <= row.keys() and not {
        "prompt",
        *_CAPTION_COLUMNS,
    } & row.keys()


def _audiocraft_rows(rows: list[dict], manifest: Path, column: str | None) -> list[dict[str, Any]]:
    """Captions of an AudioCraft manifest: `song.wav` has them in `song.json`, usually as "description"."""
    key = column or "description"
    result = []
    for row in rows:
        audio = Path(row["path"])
        beside = audio.with_suffix(".json")
        info = beside if beside.is_file() else manifest.parent / beside
        if not info.is_file():
            raise FileNotFoundError(f"{manifest} names {audio}, but its caption file {beside} does not exist")
        captions = _json(_read_text(info), str(info))
        if not isinstance(captions, dict) or key not in captions:
            raise ValueError(f"{info} has no {key!r}; name the key that holds the caption with column=")
        result.append({column or "prompt": captions[key], "path": str(audio)})
    return result


def _from_rows(rows: list[dict[str, Any]], where: str) -> Dataset:
    from datasets import Dataset

    if not rows:
        raise ValueError(f"{where} has no prompts")
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (TypeError, ValueError, OverflowError) as error:  # pyarrow's errors for columns of mixed types
        raise ValueError(f"{where}: a column mixes types ({error})") from error


def _with_prompt_column(dataset: Dataset, column: str | None, where: str) -> Dataset:
    names = dataset.column_names
    wanted = column or "prompt"
    if wanted not in names:
        candidates = [name for name in _CAPTION_COLUMNS if name in names]
        remedy = f"; choose one with column={(candidates or names or ['…'])[0]!r}"
        raise ValueError(
            f"{where} has no column {wanted!r}, only {', '.join(map(repr, names)) or 'none'}{remedy}"
        )
    if wanted != "prompt":
        dataset = dataset.remove_columns("prompt") if "prompt" in names else dataset
        dataset = dataset.rename_column(wanted, "prompt")
    if len(dataset) == 0:
        raise ValueError(f"{where} has no prompts")
    _check_prompts(dataset["prompt"], where)
    return dataset


def _check_prompts(prompts: Iterable[Any], where: str) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise ValueError(f"{where}, row {number}: a prompt is a string, found {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"{where}, row {number}: empty prompt; remove the row or fill it")
