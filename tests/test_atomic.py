"""Files are written whole or not at all, by one process at a time."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import soundfile
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from diverse_cfg.atomic import alone, filling, new_folder, replacing, write_text
from tests.faults import held


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path):
    """Catches a writer that truncates what was there, and a temporary file left behind."""
    path = tmp_path / "numbers.csv"
    assert write_text(path, "α\n") == path and path.read_text(encoding="utf-8") == "α\n"
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text(encoding="utf-8") == "α\n" and temporary.parent == tmp_path
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "α\n" and list(tmp_path.iterdir()) == [path]


def test_a_folder_belongs_to_one_process(tmp_path):
    """Catches two runs that write into one folder, and a run that locks itself out."""
    folder = tmp_path / "runs" / "quality"
    with alone(folder), alone(folder / "..") as above, alone(folder):
        assert folder.is_dir() and above.samefile(tmp_path / "runs")
    with held(folder), pytest.raises(FileExistsError, match=r"another process is writing to .*quality: wait"):
        alone(folder).__enter__()
    with alone(folder):
        pass


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path):
    """Catches temporaries that stay for ever, and the removal of what is being written or not ours."""
    dead, live = tmp_path / ".model.0123abcd.incomplete", tmp_path / ".model.ffff0000.incomplete"
    stay = [tmp_path / name for name in (".hidden", ".env.local", "clip.wav", ".git.incomplete")]
    gone = [tmp_path / ".clip.wav.0123abcd", tmp_path / "cache" / "codes" / ".x.safetensors.89abcdef"]
    for path in (*stay, *gone, dead / "model.safetensors", live / "model.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with held(live), alone(tmp_path):
        assert not any(path.exists() for path in gone) and not dead.exists()
        assert all(path.exists() for path in (*stay, live / "model.safetensors"))


def test_what_another_process_writes_below_the_folder_stays(tmp_path):
    """Catches an evaluation into runs/ that removes what a training in runs/quality is just writing."""
    running, dead = tmp_path / "quality", tmp_path / "diversity"
    half = [run / ".checkpoint-4.00000004.incomplete" for run in (running, dead)]
    for path in (*half, tmp_path / "elsewhere"):
        path.mkdir(parents=True)
    (running / ".clip.wav.0123abcd").touch()
    (tmp_path / "link").symlink_to(running)
    with held(running), alone(tmp_path):
        assert half[0].is_dir() and (running / ".clip.wav.0123abcd").exists() and not half[1].exists()
    with alone(running):
        assert not list(running.iterdir())


def test_files_of_a_folder_take_their_places_together(tmp_path):
    """Catches a student that is half the old one and half the new one, and one that a failure takes away."""
    folder = tmp_path / "new" / "student"
    with filling(folder) as temporary:
        (temporary / "model.safetensors").write_text("old")
        assert temporary.parent == folder and [temporary] == list(folder.iterdir())
    with pytest.raises(KeyboardInterrupt), filling(folder) as temporary:
        (temporary / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in folder.iterdir()] == ["old"]


def test_a_new_folder_takes_over_from_a_dead_process_only(tmp_path):
    """Catches a whole model that a killed merge left behind, and two merges into one folder, seen early."""
    dead = tmp_path / ".model.0123abcd.incomplete"
    dead.mkdir()
    with new_folder(tmp_path / "model") as temporary:
        assert not dead.exists() and temporary.parent == tmp_path
        with pytest.raises(FileExistsError, match=r"another process is writing .*model: wait"):
            new_folder(tmp_path / "model").__enter__()
        with new_folder(tmp_path / "model-2"):
            assert temporary.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-2"]


def test_a_limit_of_the_disk_is_named(tmp_path):
    """Catches safetensors' "os error 27", as on a FAT disk or under `ulimit -f`."""
    error = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    with pytest.raises(OSError, match="it is too large for this disk"), replacing(tmp_path / "model"):
        raise error
    with (
        pytest.raises(
            OSError, match=r"^[^:]*model cannot be written: the disk took less than was written: free"
        ),
        replacing(tmp_path / "folder"),
        replacing(tmp_path / "model"),
    ):  # said once
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 20480 vs 20400")


# As they come from a full disk (seen on one of 64 kB); those that do not say so need a look at the disk.
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    soundfile.LibsndfileError(2),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    """Catches safetensors', libsndfile's and torch's own errors, which are no OSError, and lost old content."""
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with (
        pytest.raises(OSError, match=r"file cannot be written: there is no space left: free some"),
        replacing(path) as temporary,
    ):
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_in_the_way_is_named(tmp_path):
    """Catches a bare errno where a file stands in the way or the disk is read-only, and blame for reading."""
    (tmp_path / "file").touch()
    for write in (lambda path: write_text(path / "page.html", ""), lambda path: alone(path).__enter__()):
        with pytest.raises(OSError, match=r"file cannot be written: a file is where a folder is needed"):
            write(tmp_path / "file")
    other, own = (OSError(errno.EROFS, "Read-only", str(place)) for place in ("/data/m", tmp_path / ".page"))
    for error, message in (
        (own, "the disk can only be read: choose another place"),
        (other, r"^\[Errno 30\] Read-only: '/data/m'$"),
        (RuntimeError("shapes differ"), "shapes differ"),
    ):
        with pytest.raises(type(error), match=message), new_folder(tmp_path / "new"):
            raise error


def test_a_disk_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available"), alone(tmp_path):
        pass


def test_weights_have_the_mode_of_other_files(tmp_path):
    """Fault: the safetensors library keeps what it writes to its owner, so that nobody else can load a model."""
    weights = {"a": torch.zeros(1)}
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x.safetensors") as path:
            save_file(weights, path)
        with filling(tmp_path / "run") as folder:
            save_file(weights, folder / "model.safetensors")
        with new_folder(tmp_path / "merged") as folder:
            save_file(weights, folder / "model.safetensors")
    finally:
        os.umask(before)
    files = list(tmp_path.rglob("*.*"))
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {0o640}
