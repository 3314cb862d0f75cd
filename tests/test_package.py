"""The wheel, built and tried where the source tree is not: what users install is what was tested."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with a freshly built sdist, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def clean(dist, tmp_path_factory):
    """Python of an environment with our wheel; torch and the rest are borrowed from the running one.

    A path in a `.pth` file does not make Python read the `.pth` files that lie there, so the editable install
    of the source tree stays out of sight; a test makes sure of it.
    """
    python = borrowing(tmp_path_factory.mktemp("clean"))
    (wheel,) = dist.glob("*.whl")
    subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel], check=True, timeout=120
    )
    return python


def borrowing(folder):
    """Python of a new environment that has all that this one has, but for an editable install."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site.stdout.strip()) / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return python


def run(python, code, cwd, timeout=300):
    """Isolated (-I): neither the current folder nor PYTHONPATH can lend the source tree."""
    result = subprocess.run(
        [python, "-I", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_wheel_holds_every_file_of_the_package(dist):
    """Catches assets, templates or py.typed that stay behind."""
    (wheel,) = dist.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("diverse_cfg/")}
    tracked = subprocess.run(["git", "ls-files", "diverse_cfg"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: nothing to compare with")
    assert set(tracked.stdout.split("\n")) - {""} <= packed
    assert "diverse_cfg/py.typed" in packed
    assert not [name for name in packed if "__pycache__" in name]


def test_an_editable_install_holds_no_second_copy(tmp_path, monkeypatch):
    """Fault: recipes that grow old in site-packages, in a folder that other programs take for the package."""
    from hatchling.build import build_editable

    monkeypatch.chdir(ROOT)
    names = zipfile.ZipFile(tmp_path / build_editable(str(tmp_path))).namelist()
    assert not [name for name in names if name.startswith("diverse_cfg/")]


def test_the_wheel_is_small(dist):
    """The shipped models are part of it, and stay within their 20 MB."""
    (wheel,) = dist.glob("*.whl")
    assert wheel.stat().st_size < 25e6


def test_the_sdist_builds_and_is_tested_alone(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt", "tests/tiny.py"} <= names


def test_the_installed_package_is_the_wheel(clean, tmp_path):
    path = Path(run(clean, "import diverse_cfg; print(diverse_cfg.__file__)", tmp_path))
    assert path.is_relative_to(clean.parent.parent)
    license_text = (
        "from importlib.metadata import metadata; print(metadata('diverse-cfg')['License-Expression'])"
    )
    assert run(clean, license_text, tmp_path) == "Apache-2.0"


def test_the_console_script_runs(clean, tmp_path):
    result = subprocess.run(
        [clean.parent / "diverse-cfg", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("diverse-cfg 0.")


def test_the_shipped_nano_base_loads_with_plain_transformers(clean, tmp_path):
    """`nano_path()` of the installed wheel is a MusicGen folder that needs nothing of ours."""
    folder = Path(run(clean, "import diverse_cfg; print(diverse_cfg.nano_path())", tmp_path))
    assert folder.is_relative_to(clean.parent.parent)
    code = (
        "import sys\n"
        "from transformers import MusicgenForConditionalGeneration, AutoProcessor\n"
        f"model = MusicgenForConditionalGeneration.from_pretrained({str(folder)!r})\n"
        f"processor = AutoProcessor.from_pretrained({str(folder)!r})\n"
        "inputs = processor(text=['a calm song'], return_tensors='pt')\n"
        "audio = model.generate(**inputs, max_new_tokens=12)\n"
        "assert 'diverse_cfg' not in sys.modules\n"
        "print(model.generation_config.guidance_scale, audio.ndim)"
    )
    assert run(clean, code, tmp_path) == "3.0 3"


def test_every_shipped_part_is_installed(clean, tmp_path):
    code = (
        "from diverse_cfg.assets import NANO_PARTS, nano_path\n"
        "print(*[part for part in NANO_PARTS if any(nano_path(part).iterdir())])"
    )
    assert run(clean, code, tmp_path).split() == [
        "base",
        "judge",
        "reward-encoder",
        "within-encoder",
        "eval-encoder",
        "prompts",
        "open-prompts",
    ]


def test_a_published_space_starts_and_plays(dist, tmp_path, monkeypatch):
    """The files that `publish --space` would send, in an environment that has its requirements and not this package."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from diverse_cfg.publishing import plan_space
    from tests.playing.worlds import save_students

    (wheel,) = dist.glob("*.whl")
    space, home = tmp_path / "space", tmp_path / "home"
    for file in plan_space("me/play", ["me/quality", "me/diversity"], wheel=wheel).files:
        space.mkdir(exist_ok=True)
        (space / file.path_in_repo).write_bytes(file.content)
    for path in map(Path, save_students(tmp_path)):
        cached = home / "hub" / f"models--me--{path.name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("c0ffee")
        (cached / "snapshots").mkdir()
        path.rename(cached / "snapshots" / "c0ffee")
    python = borrowing(tmp_path / "environment")
    code = (
        "import runpy, sys, urllib.request\n"
        "found = runpy.run_path('app.py')\n"
        "_, url, _ = found['demo'].launch(prevent_thread_lock=True, quiet=True, **found['options'])\n"
        "assert urllib.request.urlopen(url).status == 200\n"
        "from diverse_cfg.playing.player import Wish\n"
        "wish = Wish('piano melody', 2, 1.0, merge_weight=0.5)\n"
        "events = list(found['demo'].player.play(wish, cancelled=__import__('threading').Event()))\n"
        "import diverse_cfg\n"
        "print(diverse_cfg.__file__, sum(isinstance(event, tuple) for event in events), flush=True)\n"
        "__import__('os')._exit(0)"  # the server goes on
    )
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place, takes = run(python, code, space, timeout=900).splitlines()[-1].rsplit(" ", 1)
    assert Path(place).is_relative_to(tmp_path / "environment") and takes == "2"


TWO_STEPS = (
    "--recipe nano/quality --max_steps 2 --num_generations 2 --clip_seconds 0.4 --warmup_steps 0 --logging_steps 1 "
    "--eval_strategy no --eval_on_start false --save_strategy no --report_to none"
)


LAUNCHES = {
    "one": "--per_device_train_batch_size 4",
    "two": "--per_device_train_batch_size 2 --accelerate_config multi_cpu --num_processes 2 --main_process_port 0",
}


def test_a_recipe_trains_where_there_is_no_clone(clean, tmp_path):
    """Fault: recipes, prompts or launch configurations that the wheel left behind; processes that never meet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # it may lend the source tree

    def program(*words):
        result = subprocess.run(
            [clean.parent / "diverse-cfg", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    listed = program("recipes")
    assert "nano/quality " in listed and "multi_cpu " in listed
    divergence = {}
    for name, line in LAUNCHES.items():
        assert program("train", *TWO_STEPS.split(), *line.split(), "--output_dir", name).split()[-1] == name
        assert (tmp_path / name / "model.safetensors").is_file()
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        divergence[name] = [entry["kl/clip"] for entry in log if "kl/clip" in entry]
    assert len(divergence["one"]) == 2
    # The same clips, shared; an update in bfloat16 adds its roundings.
    assert divergence["two"][0] == pytest.approx(divergence["one"][0], rel=1e-4)
    assert divergence["two"][1] == pytest.approx(divergence["one"][1], rel=1e-2)


def test_the_musicgen_recipes_find_their_prompts(clean, tmp_path):
    code = (
        "from diverse_cfg.assets import source\n"
        "from diverse_cfg.prompts import load_prompts\n"
        "print(len(load_prompts(source('recipes/prompts', 'prompts'), split='test')))"
    )
    assert run(clean, code, tmp_path) == "104"
