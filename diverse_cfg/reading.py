"""Files that others wrote, or that were damaged on the way: what is wrong becomes one line that names the file.

Libraries answer with whatever exception their parser happened to raise. Those are turned into ours here, where
the file enters, and nowhere else.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COPY_AGAIN = "copy, download or save it again"


class UnreadableError(ValueError):
    """A file or folder that is not what it should be; the text names it and the remedy."""


@contextmanager
def reading(path: str | os.PathLike, remedy: str = COPY_AGAIN) -> Iterator[None]:
    """Turn what a library says about a file that it cannot use into one line. Keep the block to that call.

    Args:
        path: file or folder, which the message names.
        remedy: what to do about it.

    Raises:
        UnreadableError: the library failed.
        OSError: it is not there, or may not be read.
    """
    try:
        yield
    except Exception as error:  # tokenizers, safetensors and huggingface_hub raise plain `Exception`s
        if (
            isinstance(error, UnreadableError | MemoryError | ImportError)
            or "OutOfMemory" in type(error).__name__
        ):
            raise  # said already, or not the file's fault
        named = getattr(error, "filename", None) or path
        if isinstance(error, PermissionError):
            raise PermissionError(f"{named} may not be read by this user: change its permissions") from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        text = f"{path} cannot be read ({reason}): {remedy}"
        if isinstance(error, OSError):
            raise (FileNotFoundError if isinstance(error, FileNotFoundError) else OSError)(text) from error
        raise UnreadableError(text) from error


def read_json(path: str | os.PathLike, remedy: str = COPY_AGAIN) -> dict[str, Any]:
    """A file that holds settings by name.

    Raises:
        UnreadableError, OSError: not JSON, or not a mapping; see `reading`.
    """
    with reading(path, remedy):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise UnreadableError(f"{path} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise UnreadableError(f"{path} holds a {type(content).__name__}, not settings by name: {remedy}")
    return content


def last_checkpoint(output_dir: str | os.PathLike, before: int | None = None) -> str | None:
    """The newest complete checkpoint of a run, or the newest before a step; None without one.

    It is written beside its place. Older versions of this package wrote it there, `trainer_state.json` last.
    """
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    numbers = {int(path.name.removeprefix("checkpoint-")): path for path in found if path.name[11:].isdigit()}
    numbers = {number: path for number, path in numbers.items() if before is None or number < before}
    return str(numbers[max(numbers)]) if numbers else None


def load_complete(kind: Any, source: str | os.PathLike, **options: Any) -> Any:
    """`kind.from_pretrained(source)`, but tensors that the files lack are not filled with random numbers.

    Args:
        kind: a model class of transformers.
        source: folder or Hub id.
        **options: for `from_pretrained`.

    Raises:
        ValueError: tensors are missing, or see `reading`.
    """
    with reading(source):
        model, found = kind.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} tensor(s) of its model, e.g. {missing[0]}: it is incomplete; {COPY_AGAIN}"
        )
    return model
