"""Prompt datasets: the only data that on-policy training needs.

A source is a Hub dataset id, a local folder, or one file (`.csv`, `.json`, `.jsonl`, `.parquet`, `.txt`, the
text formats also `.gz`). What comes back always has a `prompt` column of non-empty strings; the other columns
are kept, because the trainer hands them to the reward functions. An AudioCraft manifest (one audio file per line,
captions in a JSON file beside each audio file) is such a file too.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, ValuesView
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diverse_cfg.assets import shipped
from diverse_cfg.reading import reading

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = (".csv", ".json", ".jsonl", ".parquet", ".txt")
# Columns that usually hold a caption; suggested, never guessed.
_CAPTION_COLUMNS = ("caption", "text", "description")
_SPLITS = ("train", "validation", "valid", "dev", "test", "eval")
# One of several files of a split, as the Hub names them: train-00000-of-00002.parquet, perhaps with a hash.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")


def load_prompts(
    source: Any, *, split: str = "train", column: str | None = None, default_split: str = "train"
) -> Dataset:
    """Load prompts from wherever they are into a dataset with a `prompt` column.

    Args:
        source: Hub dataset id, folder, or file; `nano` or `nano-open`, the shipped ones; a `Dataset` or
            `DatasetDict`; a table (pandas, polars, Arrow); a dict of columns; or a list, tuple, iterator, array or
            series of strings or of dicts.
        split: which split of a Hub dataset, a `DatasetDict` or a folder with one file, or all shards, per split.
        column: the column that holds the prompts (e.g. "caption"); None asks for "prompt".
        default_split: the split that stands for none: a source without splits takes no other.

    Returns:
        A `datasets.Dataset`; the chosen column is called `prompt`, the others keep their names.

    Raises:
        FileNotFoundError: the path, or the split's file in the folder, does not exist.
        ValueError: unknown type or format, a damaged file, an unreadable row, no such column, an empty
            prompt (with its row number), or a split of what has none.
    """
    if not isinstance(source, str | Path):
        where = f"the {type(source).__name__}"
        return _with_prompt_column(_from_object(source, split, where, default_split), column, where)
    if source == "":  # a variable of a shell that is not set, say; as a path it is this folder
        raise ValueError("the name of the prompts is empty: name a file, a folder or a Hub dataset")
    source = shipped(source, "prompts")
    path = Path(source).expanduser()
    if "[" in split and path.exists():
        raise ValueError(
            f"{str(source)!r}: split={split!r} is a slice, which only a dataset of the Hub can give: put the wanted "
            "rows into a file of their own"
        )
    if path.is_dir():
        dataset = _from_folder(path, split, column, default_split)
    elif path.is_file():
        require_no_split(split, default_split, f"the file {source}")
        dataset = _from_file(path, column)
    elif _looks_like_path(str(source)):
        raise FileNotFoundError(f"no prompt file or folder {str(source)!r}")
    else:
        dataset = _from_hub(str(source), split)
    return _with_prompt_column(dataset, column, repr(str(source)))


def require_no_split(split: str, default_split: str, where: str) -> None:
    """Refuse a split of a source that has none; `default_split` stands for none."""
    if split != default_split:
        raise ValueError(
            f"split={split!r}: {where} has no splits; leave it out, or name a source that has it"
        )


def _from_object(source: Any, split: str, where: str, default_split: str) -> Dataset:
    from datasets import Dataset, IterableDataset

    if isinstance(source, Mapping) and any(
        isinstance(part, Dataset | IterableDataset) for part in source.values()
    ):
        source = _chosen_split(source, split, where)
    elif not isinstance(source, Dataset) or str(source.split) != split:  # some know what they are
        require_no_split(split, default_split, where)
    if isinstance(source, Dataset):
        return source
    if isinstance(source, IterableDataset):
        raise ValueError(f"{where} is a stream: pass it to the trainer as it is, or make a list of its rows")
    to_list = getattr(source, "tolist", None) or getattr(source, "to_list", None)  # arrays and series
    if to_list is not None:
        source = to_list()
    elif hasattr(source, "__arrow_c_stream__"):
        source = _table_columns(source, where)
    if isinstance(source, Mapping):
        return _from_columns(source, where)
    # A set has another order in every process; other containers hold something else than their prompts.
    if not isinstance(source, Sequence | Iterator | ValuesView) or isinstance(source, str):
        raise ValueError(
            f"{where} is no source of prompts: pass a file, a dataset, a table, or a list of texts "
            "(sorted(…) makes one of a set)"
        )
    return _from_rows(_as_rows(source, where), where)


def _table_columns(table: Any, where: str) -> dict[str, list]:
    """Columns of a pandas, polars or Arrow table, without pandas' numbering of rows."""
    import pyarrow

    with _named(where):
        table = pyarrow.table(table)
    _check_distinct(table.column_names, where)
    return {
        name: values for name, values in table.to_pydict().items() if not name.startswith("__index_level_")
    }


def _check_distinct(columns: Sequence[str], where: str) -> None:
    for name in columns:
        if columns.count(name) > 1:
            raise ValueError(f"{where} has the column {name!r} twice: rename one")


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors of `datasets` and pyarrow as one line that names the source."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (FileNotFoundError, ConnectionError):
        raise
    except (DatasetsError, pyarrow.ArrowException, ValueError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{where} cannot be read: {reason}") from error


def _chosen_split(splits: Mapping, split: str, where: str) -> Dataset:
    if split not in splits:
        raise ValueError(f"{where} has the splits {', '.join(map(str, splits))}, not {split!r}")
    return splits[split]


def _looks_like_path(source: str) -> bool:
    """A Hub id has one slash at most and none of our file endings."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or _format(Path(source)) is not None


def _format(path: Path) -> str | None:
    ending = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    return ending if ending in _FORMATS else None


def _from_hub(name: str, split: str) -> Dataset:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        with _named(repr(name)):
            dataset = load_dataset(name, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a local file nor a reachable Hub dataset: {error}"
        ) from error
    assert isinstance(dataset, Dataset)  # a split was named, so it is neither a dict of splits nor a stream
    return dataset


def _from_folder(folder: Path, split: str, column: str | None, default_split: str) -> Dataset:
    from datasets import concatenate_datasets, load_from_disk

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        with _named(str(folder)):
            saved = load_from_disk(str(folder))
        return _from_object(saved, split, str(folder), default_split)
    files = sorted(path for path in folder.iterdir() if path.is_file() and _format(path))
    shards = {path: _SHARD.fullmatch(path.name.split(".")[0]) for path in files}
    splits = {path: shard[1] if shard else path.name.split(".")[0] for path, shard in shards.items()}
    chosen = [path for path in files if splits[path] == split]
    if not chosen and len({*splits.values()}) == 1 and splits[files[0]] not in _SPLITS:
        require_no_split(split, default_split, f"the folder {folder}, with {files[0].name},")
        chosen = files  # a folder with a single file needs no split names
    parts = [(int(shard[2]), int(shard[3])) for path in chosen if (shard := shards[path])]
    count = parts[0][1] if parts else 1
    if missing := [number for number in range(count) if parts and (number, count) not in parts]:
        raise FileNotFoundError(
            f"{folder} lacks shard {missing[0]:05d} of the {count} of {splits[chosen[0]]}: copy or download it again"
        )
    if len(chosen) != count:
        found = ", ".join(path.name for path in files) or "none"
        raise FileNotFoundError(
            f"{folder} needs one prompt file named after the split ({split}.txt, {split}.csv, {split}.jsonl, "
            f"…); prompt files there: {found}"
        )
    datasets = [_from_file(path, column) for path in chosen]
    with _named(str(folder)):
        return concatenate_datasets(datasets) if datasets[1:] else datasets[0]


def _from_file(path: Path, column: str | None) -> Dataset:
    import pyarrow.parquet
    from datasets import Dataset

    ending = _format(path)
    if ending is None:
        raise ValueError(
            f"{path}: unknown prompt format; use one of {', '.join(_FORMATS)} (text formats may be .gz)"
        )
    if ending == ".parquet":
        with _named(str(path)):
            if not pyarrow.parquet.read_metadata(path).num_rows:  # which `datasets` fails at
                raise ValueError("it has no prompts")
            dataset = Dataset.from_parquet(str(path))
        assert isinstance(dataset, Dataset)
        return dataset
    text = read_text(path)
    if ending == ".txt":
        rows: list[dict[str, Any]] = [{"prompt": line.strip()} for line in _lines(text) if line.strip()]
    elif ending == ".csv":
        rows = _csv_rows(text, path)
    else:
        rows = _json_rows(text, path, lines=ending == ".jsonl")
    if rows and _is_audiocraft_manifest(rows[0]):
        rows = _audiocraft_rows(rows, path, column)
    return _from_rows(rows, str(path))


def read_text(path: Path) -> str:
    with reading(path):
        data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no complete gzip file ({error}): copy or write it again") from error
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    if text.startswith("version https://git-lfs.github.com/"):
        raise ValueError(f"{path} is a pointer of Git LFS in place of the file: fetch it with git lfs pull")
    if "\0" in text:  # so looks UTF-16 without a byte-order mark
        raise ValueError(f"{path} is not UTF-8 text, it has NUL characters: save it as UTF-8")
    return text


def _lines(text: str) -> Iterator[str]:
    """Lines as files have them; `splitlines` also cuts at U+2028, NEL and form feed, which texts contain."""
    return io.StringIO(text, newline=None)


def _csv_rows(text: str, path: Path) -> list[dict[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, whole = [], 0  # the last line of what could be read
    try:
        header = next(reader, [])
        whole = reader.line_num
        _check_distinct(header, str(path))
        if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
            raise ValueError(f"{path} has the single column {header[0]!r}: separate columns by commas")
        for cells in filter(None, reader):  # a blank line has none
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells do not match the header"
                )
            rows.append(dict(zip(header, cells, strict=True)))
            whole = reader.line_num
    except csv.Error as error:
        raise ValueError(
            f"{path}, after line {whole}: {error}; a quote that opens a cell must close it"
        ) from error
    return rows


def _json_rows(text: str, path: Path, *, lines: bool) -> list[dict[str, Any]]:
    if lines:
        items = [_json(line, f"{path}, line {n}") for n, line in enumerate(_lines(text), 1) if line.strip()]
    else:
        items = _json(text, str(path))
        if not isinstance(items, list):
            raise ValueError(
                f"{path} must hold a list of prompts or of objects, not a {type(items).__name__}"
            )
    return _as_rows(items, str(path))


def _as_rows(items: Iterable[Any], where: str) -> list[dict[str, Any]]:
    rows = [{"prompt": item} if isinstance(item, str) else item for item in items]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}, row {number}: expected a string or an object, found {type(row).__name__}"
            )
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: JSON that cannot be read ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that occurs twice, `json` would take the last value."""
    _check_distinct([name for name, _ in pairs], "an object")
    return dict(pairs)


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
        if not isinstance(row.get("path"), str):
            raise ValueError(
                f"{manifest}: a row has the path {row.get('path')!r}; it must name an audio file"
            )
        audio = Path(row["path"])
        beside = audio.with_suffix(".json")
        info = beside if beside.is_file() else manifest.parent / beside
        if not info.is_file():
            raise FileNotFoundError(f"{manifest} names {audio}, but its caption file {beside} does not exist")
        captions = _json(read_text(info), str(info))
        if not isinstance(captions, dict) or key not in captions:
            raise ValueError(f"{info} has no {key!r}; name the key that holds the caption with column=")
        result.append({column or "prompt": captions[key], "path": str(audio)})
    return result


def _from_rows(rows: list[dict[str, Any]], where: str) -> Dataset:
    if not rows:
        raise ValueError(f"{where} has no prompts")
    names = dict.fromkeys(name for row in rows for name in row)
    return _from_columns({name: [row.get(name) for row in rows] for name in names}, where)


def _from_columns(columns: Mapping[str, Any], where: str) -> Dataset:
    from datasets import Dataset

    for name, values in columns.items():
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise ValueError(f"{where}: column {name!r} is a {type(values).__name__}; pass a list of values")
    try:
        return Dataset.from_dict({name: list(values) for name, values in columns.items()})
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # mostly pyarrow's
        raise ValueError(f"{where}: a column mixes types or cannot be stored ({error})") from error


def check_column(names: Sequence[str], column: str | None, where: str) -> str:
    """The column that holds the prompts, which must be among `names`; "prompt" by default."""
    wanted = column or "prompt"
    if wanted not in names:
        candidates = [name for name in _CAPTION_COLUMNS if name in names]
        remedy = f"; choose one with column={(candidates or names or ['…'])[0]!r}, or rename it"
        raise ValueError(
            f"{where} has no column {wanted!r}, only {', '.join(map(repr, names)) or 'none'}{remedy}"
        )
    return wanted


def _with_prompt_column(dataset: Dataset, column: str | None, where: str) -> Dataset:
    names = dataset.column_names
    wanted = check_column(names, column, where)
    if wanted != "prompt":
        dataset = dataset.remove_columns("prompt") if "prompt" in names else dataset
        dataset = dataset.rename_column(wanted, "prompt")
    if len(dataset) == 0:
        raise ValueError(f"{where} has no prompts")
    check_prompts(dataset["prompt"], where)
    return dataset


def check_prompts(prompts: Iterable[Any], where: str, first: int = 1) -> None:
    """Raise `ValueError` for a prompt that is blank or no text; rows count from `first`."""
    for number, prompt in enumerate(prompts, first):
        if not isinstance(prompt, str):
            raise ValueError(f"{where}, row {number}: a prompt is a string, found {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"{where}, row {number}: empty prompt; remove the row or fill it")
