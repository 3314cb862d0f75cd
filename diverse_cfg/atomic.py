"""Files and folders written whole, by one process at a time: a reader finds the old content or the new one,
never half of it."""

import errno
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")
_INCOMPLETE = re.compile(r"\.(.+)\.[0-9a-f]{8}\.incomplete")
_REMEDIES = {
    errno.ENOSPC: "there is no space left: free some, or write to another disk",
    errno.EDQUOT: "the disk quota is used up: free some, or write to another disk",
    errno.EACCES: "there is no permission to write: change it, or choose another place",
    errno.EPERM: "there is no permission to write: change it, or choose another place",
    errno.EROFS: "the disk can only be read: choose another place",
    errno.EFBIG: "it is too large for this disk or for `ulimit -f`: write to another disk, or raise the limit",
    errno.ENOTDIR: "a file is where a folder is needed: remove it, or choose another place",
    errno.EEXIST: "a file is where a folder is needed: remove it, or choose another place",
    errno.EISDIR: "a folder is where a file is needed: remove it, or choose another place",
}
_held: set[str] = set()


class UnwritableError(OSError):
    """A full disk or the like; the text names the file and the remedy."""


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Whatever stops the block from writing `path` becomes an `UnwritableError` that names it and a remedy.

    safetensors, soundfile and torch report a full disk as errors of their own.
    """
    try:
        yield
    except Exception as error:
        foreign = type(error).__name__ in ("SafetensorError", "LibsndfileError")
        torchs = "inline_container.cc" in str(error) or "PytorchStreamWriter" in str(error)
        foreign |= torchs and not isinstance(error, OSError)
        vague = torchs or "System error" in str(error)  # libsndfile's
        number = error.errno if isinstance(error, OSError) else None
        if not foreign and number not in _REMEDIES:
            raise
        path = Path(path)
        where = Path(os.fsdecode(getattr(error, "filename", None) or path))
        where = path if _TEMPORARY.fullmatch(where.name) else where
        if where not in (path, *path.parents) and path.parent not in where.parents:
            raise  # what it reads, not what it writes
        if foreign and (told := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(told.group(1))
        elif foreign and shutil.disk_usage(path.parent).free < 2**20:
            number = errno.ENOSPC
        reason = "the disk took less than was written" if vague else " ".join(str(error).split())
        remedy = _REMEDIES.get(number or 0) or f"{reason}: free some, or write to another disk"
        raise UnwritableError(f"{where} cannot be written: {remedy}") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there takes its place, unless an error came."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with writing(path):
            mode = _usual_mode(temporary)
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a text file in UTF-8, its folder too if need be; return its path."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@contextmanager
def alone(folder: str | os.PathLike) -> Iterator[Path]:
    """Hold a folder while the block runs, made if need be; what killed runs left half-written in it goes.

    The system lets go of it also when the process is killed. Holding it twice in one process is allowed.

    Raises:
        FileExistsError: another process holds it.
        OSError: it cannot be made.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    name = os.path.realpath(folder)
    if name in _held:
        yield folder
        return
    descriptor = _lock(folder)
    if descriptor is None:
        raise FileExistsError(
            f"another process is writing to {folder}: wait until it has ended, or choose another folder"
        )
    _held.add(name)
    try:
        _remove_leftovers(folder, depth=2)
        yield folder
    finally:
        _held.discard(name)
        os.close(descriptor)


def require_new(output: str | os.PathLike) -> Path:
    """The output path, after checking that nothing is there.

    Raises:
        FileExistsError: something is; nothing is ever overwritten.
    """
    path = Path(output)
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already: choose another output, or remove it first")
    return path


def require_space(folder: Path, num_bytes: int, path: Path) -> None:
    """Raise `UnwritableError` unless the disk of `folder` has room for what `path` needs."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UnwritableError(
            f"{path} cannot be written: {num_bytes / 1e9:.2g} GB are needed and {free / 1e9:.2g} GB are free: "
            "free some space, or write to another disk"
        )


@contextmanager
def new_folder(output: str | os.PathLike, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling to write into; it becomes `output` when the block ends well, and vanishes when it
    fails.

    Args:
        output: the folder that shall appear; its parents are created.
        num_bytes: space that the block is going to need.

    Raises:
        FileExistsError: `output` is there already or appeared meanwhile, or another process is writing it.
        OSError: not enough space, found before writing or while it happens.
    """
    path = require_new(output)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for sibling in path.parent.glob(".*.incomplete"):
        match = _INCOMPLETE.fullmatch(sibling.name)
        if match and match.group(1) == path.name and not _remove_leftover(sibling):
            raise FileExistsError(
                f"another process is writing {path}: wait until it has ended, or choose another output"
            )
    require_space(path.parent, num_bytes, path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        with writing(path), alone(temporary):
            yield temporary
            open_weights(temporary)
            require_new(path)  # a rename would replace an empty folder without a word
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def filling(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder inside `folder`, made if need be; its files take their places there when the block ends
    well. Until then, and when it fails, what was there stays."""
    folder = Path(folder)
    temporary = folder / f".files.{uuid.uuid4().hex[:8]}.incomplete"
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            yield temporary
            open_weights(temporary)
            for path in sorted(temporary.iterdir()):
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _usual_mode(path: Path) -> int:
    """Mode of a new file at this place."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def open_weights(folder: Path) -> None:
    """Give weights the mode that other files have: the safetensors library keeps its files to their owner."""
    mode = _usual_mode(folder / ".mode")
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def _remove_leftovers(folder: Path, depth: int) -> None:
    """Remove what killed runs left half-written, but not below a folder that another process holds."""
    for path in list(folder.iterdir()):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
        elif _INCOMPLETE.fullmatch(path.name):
            _remove_leftover(path)
        elif not depth or path.is_symlink() or not path.is_dir() or not os.access(path, os.R_OK | os.W_OK):
            continue
        elif (descriptor := _lock(path, quiet=True)) is not None:
            _remove_leftovers(path, depth - 1)
            os.close(descriptor)


def _remove_leftover(folder: Path) -> bool:
    """Remove a temporary of `new_folder`; False if somebody is writing it still."""
    descriptor = _lock(folder)
    if descriptor is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
    return True


def _lock(folder: Path, quiet: bool = False) -> int | None:
    """A descriptor that holds the folder; None if another process does, or quietly if it cannot be told."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:  # some network disks have no locks for folders
        if quiet:
            os.close(descriptor)
            return None
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): see that no other process writes there",
            stacklevel=4,
        )
    return descriptor
