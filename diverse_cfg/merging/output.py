"""Output folders that appear only when they are complete."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_new(output: str | os.PathLike) -> Path:
    """The output path, after checking that nothing is there.

    Raises:
        FileExistsError: something is; nothing is ever overwritten.
    """
    path = Path(output)
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already: choose another output, or remove it first")
    return path


@contextmanager
def new_folder(output: str | os.PathLike, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling to write into; it becomes `output` when the block ends well, and vanishes when it
    fails.

    Args:
        output: the folder that shall appear; its parents are created.
        num_bytes: space that the block is going to need.

    Raises:
        FileExistsError: `output` is there already, or appeared meanwhile.
        OSError: not enough space, found before writing or while it happens.
    """
    path = require_new(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise _no_space(path, f"{num_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
    temporary.mkdir()
    try:
        yield temporary
        require_new(path)  # a rename would replace an empty folder without a word
        temporary.rename(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(path, "the disk filled up while writing") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _no_space(path: Path, what: str) -> OSError:
    return OSError(errno.ENOSPC, f"no space for {path}: {what}; free some, or write to another disk")
