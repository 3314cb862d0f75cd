"""`diverse-cfg generate`: clips on disk, sampled as the model's own settings say unless told otherwise."""

import json

import pytest
import soundfile
from transformers import GenerationConfig

import diverse_cfg.policies.files as files
from diverse_cfg.cli import generate as command
from diverse_cfg.cli import main
from diverse_cfg.provenance import Provenance, write_provenance
from tests.evaluation.worlds import WaveEncoder
from tests.tiny import save_tiny

PROMPT = "a calm piano song"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny checkpoint that says it was distilled."""
    folder = save_tiny(tmp_path_factory.mktemp("student") / "model")
    write_provenance(folder, Provenance(kind="student", guidance_scale=3.0))
    settings = GenerationConfig.from_pretrained(folder)
    settings.update(top_k=0, temperature=0.9, guidance_scale=1.0)
    settings.save_pretrained(folder)
    return folder


@pytest.fixture
def called(monkeypatch):
    """Keyword arguments of `generate_files`, which then does nothing."""
    calls = []
    monkeypatch.setattr(files, "generate_files", lambda *args, **kwargs: calls.append((*args, kwargs)) or [])
    return calls


def test_clips_are_written(tiny_folder, tmp_path, capsys, refused):
    """The whole command: files that play, named in the list, the same again with the same seed, resumable."""
    arguments = ["generate", "--model", tiny_folder, "--prompt", PROMPT, "--prompt", "sad cello"]
    arguments += ["--num-generations", "2", "--seconds", "0.2", "--sample-format", "float32"]
    assert main([*arguments, "--output", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"4 clips in {tmp_path / 'a'}\n"
    clips = json.loads((tmp_path / "a" / "generations.json").read_text())["clips"]
    assert [clip["prompt"] for clip in clips] == [PROMPT, PROMPT, "sad cello", "sad cello"]
    audio = [soundfile.read(tmp_path / "a" / clip["file"]) for clip in clips]
    assert all(rate == 3200 and len(samples) == 640 for samples, rate in audio)
    assert not (audio[0][0] == audio[1][0]).all()

    assert "not empty" in refused(*arguments, "--output", tmp_path / "a")
    (tmp_path / "a" / clips[1]["file"]).unlink()
    assert main([*arguments, "--output", str(tmp_path / "a"), "--resume"]) == 0
    again, _ = soundfile.read(tmp_path / "a" / clips[1]["file"])
    assert abs(again - audio[1][0]).max() < 1e-4  # another batch rounds differently


def test_takes_are_chosen_and_continued(tiny_folder, tmp_path, capsys, refused, monkeypatch):
    """The way of a user: some takes of many samples, one of them made longer, its prompt taken from the take."""
    monkeypatch.setattr("diverse_cfg.embeddings.load_embedder", lambda *_, **__: WaveEncoder())
    words = ["generate", "--model", tiny_folder]
    many = [*words, "--prompt", PROMPT, "--seconds", "0.2", "--takes", "2", "--of", "4"]
    assert main([*many, "--output", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out  # 10 frames, 3 of delay, null rows, four samples for two takes
    assert (
        said
        == f"2 takes in {tmp_path / 'a'}, 52 decoder rows each; listen: {tmp_path / 'a' / 'index.html'}\n"
    )
    take = tmp_path / "a" / "take-01.wav"
    longer = [*words, "--extend", str(take), "--seconds", "0.6"]
    assert main([*longer, "--output", str(tmp_path / "b")]) == 0
    (clip,) = json.loads((tmp_path / "b" / "generations.json").read_text())["clips"]
    assert clip["prompt"] == PROMPT and len(soundfile.read(tmp_path / "b" / clip["file"])[0]) == 30 * 64

    take.with_suffix(".safetensors").unlink()
    other = ["--output", str(tmp_path / "c")]
    for flags, message in (
        ([*longer, *other], "take-01.safetensors that name a prompt: name one with --prompt"),
        ([*words, "--extend", str(take), *other], "--extend needs --seconds"),
        (
            [*words, "--extend", "nothere.wav", "--seconds", "1", *other],
            "--extend nothere.wav: there is no such",
        ),
        ([*words, *other], "one of the arguments --prompt --prompts is required"),
        ([*many[:-1], "2", *other], "--of 2 needs --takes, a smaller number"),
        ([*many[:5], "--of", "2", *other], "--of 2 needs --takes, a smaller number"),
        ([*many[:-2], "--encoder", "x", *other], "--encoder x has no effect without --of"),
        (
            [*many[:-2], "--temperature", "0", *other],
            "--takes 2 at temperature 0 is the same clip every time",
        ),
    ):
        assert message in refused(*flags)
    assert (
        main([*longer, "--prompt", "sad cello", "--output", str(tmp_path / "c")]) == 0
    )  # the audio is encoded


@pytest.mark.parametrize("weight", [["2"], ["-0.5"], ["0.7", "0.7"]])
def test_weights_beyond_the_experts_are_refused_in_terms_of_this_command(tiny_folder, refused, weight):
    """Fault: a remedy that is an option of another command."""
    words = ["generate", "--model", tiny_folder, "--adapter", "a", "--adapter", "b", "--prompt", PROMPT]
    said = refused(*words, "--output", "out", "--merge-weight", *weight)
    assert f"--merge-weight {' '.join(weight)} " in said and "diverse-cfg merge" in said
    assert "extrapolate" not in said and "unnormalized" not in said


def test_a_base_plays_as_it_is_meant_to(called, tiny_folder):
    """Guidance of its own generation config, AudioCraft's top-k where it names none, and its own length."""
    assert main(["generate", "--model", tiny_folder, "--prompt", PROMPT, "--output", "out"]) == 0
    settings = called[0][-1]
    assert (settings["guidance_scale"], settings["top_k"], settings["temperature"]) == (3.0, 250, 1.0)
    assert settings["num_frames"] == 17  # 20 steps, three of them the delay of four codebooks


def test_guidance_that_changes_over_the_clip(called, tiny_folder, capsys):
    """A schedule of the base's own γ; a name that is none is refused before the model is loaded."""
    arguments = [
        "generate",
        "--model",
        tiny_folder,
        "--prompt",
        PROMPT,
        "--output",
        "out",
        "--seconds",
        "0.1",
    ]
    assert main([*arguments, "--guidance-schedule", "interval 0 0.5"]) == 0
    assert called[0][-1]["guidance_scale"] == (3.0, 3.0, 3.0, 1.0, 1.0)
    assert main([*arguments, "--guidance-schedule", "adaptive 0.1 5"]) == 0
    assert called[1][-1]["guidance_scale"] == 3.0 and called[1][-1]["adaptive_guidance"] == (0.1, 5)
    assert main([*arguments, "--guidance-schedule", "ramp"]) == 2
    assert "guidance_schedule='ramp' must be constant, linear" in capsys.readouterr().err


def test_another_model_begins(called, tiny_folder, student, refused):
    """It is guided as its own settings say, the model that goes on as its own; each can be told otherwise."""
    words = ["generate", "--model", student, "--prompt", PROMPT, "--output", "out", "--first", tiny_folder]
    assert main([*words, "--first-frames", "5"]) == 0
    settings = called[0][-1]
    assert (settings["first_guidance_scale"], settings["guidance_scale"]) == (3.0, 1.0)
    assert settings["first_frames"] == 5 and settings["model_name"] == f"{tiny_folder}, then {student}"
    assert main([*words, "--first-frames", "5", "--first-guidance-scale", "1"]) == 0
    assert called[1][-1]["first_guidance_scale"] == 1.0
    for flags, message in (
        (words, "--first needs --first-frames"),
        ([*words[:-2], "--first-frames", "5"], "--first-frames 5 has no effect without --first"),
        ([*words, "--first-frames", "5", "--first-guidance-scale", "0"], "guidance_scale=0.0 must be"),
        ([*words, "--first-frames", "5", "--extend", "x.wav"], "has no effect with --extend"),
    ):
        assert message in refused(*flags)


def test_a_student_plays_without_guidance_and_as_it_was_trained(called, student, capsys):
    """Catches guidance applied twice, and a filter that the student never saw."""
    assert main(["generate", "--model", student, "--prompt", PROMPT, "--output", "out"]) == 0
    settings = called[0][-1]
    assert (settings["guidance_scale"], settings["top_k"], settings["temperature"]) == (1.0, 0, 0.9)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--guidance-schedule", "linear"], ["--negative-prompt", "noise"]])
def test_guidance_that_a_student_does_not_have_is_refused(called, student, refused, flag):
    """Fault: the schedule of a model's own γ = 1 does nothing, and nothing says so."""
    words = ["generate", "--model", student, "--prompt", PROMPT, "--output", "out"]
    assert f"{' '.join(flag)} has no effect for a model that plays with γ = 1" in refused(*words, *flag)
    assert not called


def test_a_student_that_is_guided_all_the_same(student, tmp_path, capsys):
    """It is done as asked, and said once, however many clips there are."""
    short = ["--seconds", "0.1", "--num-generations", "3", "--batch-size", "1", "--guidance-scale", "3"]
    assert (
        main(["generate", "--model", student, "--prompt", PROMPT, *short, "--output", f"{tmp_path}/out"]) == 0
    )
    assert capsys.readouterr().err.count("guidance would be applied twice") == 1


def test_flags_win_and_prompts_come_from_files(called, tiny_folder, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"caption": PROMPT}))
    flags = [
        "--guidance-scale",
        "2",
        "--top-k",
        "5",
        "--temperature",
        "0.5",
        "--min-p",
        "0.1",
        "--seconds",
        "0.1",
    ]
    source = ["--prompts", str(tmp_path), "--prompt-column", "caption"]
    assert main(["generate", "--model", tiny_folder, *source, *flags, "--output", "out", "--seed", "7"]) == 0
    _, prompts, output, settings = called[0]
    assert (prompts, output) == ([PROMPT], "out")
    expected = {
        "guidance_scale": 2.0,
        "top_k": 5,
        "temperature": 0.5,
        "min_p": 0.1,
        "num_frames": 5,
        "seed": 7,
    }
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", " "], "empty prompt"),
        (["--prompts", "/no/such/file.txt"], "no prompt file or folder"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be 0 (greedy) or"),
        (["--prompt", "x", "--temperature", "nan"], "temperature=nan must be"),
        (["--prompt", "x", "--guidance-scale", "inf"], "guidance_scale=inf must be a finite number"),
        (["--prompt", "x", "--top-p", "0"], "top_p=0.0 must be above 0"),
        (["--prompt", "x", "--seconds", "1e6"], "ask for at most 600 s"),
        (
            ["--prompt", "x", "--prompts-split", "train"],
            "--prompts-split train has no effect with --prompt: leave",
        ),
        (["--prompt", "x", "--prompt-column", "a"], "--prompt-column a has no effect with --prompt"),
        (["--prompts", __file__, "--prompts-split", "a"], "--prompts-split a has no effect for a file"),
        (["--prompt", "x", "--temperature", "0", "--seed", "0"], "--seed 0 has no effect at temperature 0"),
        (["--prompt", "x", "--temperature", "0", "--top-k", "5"], "--top-k 5 has no effect at temperature 0"),
        (["--prompt", "x", "--temperature", "0", "--num-generations", "2"], "is the same clip every time"),
        (
            ["--prompt", "x", "--guidance-scale", "1", "--negative-prompt", "y"],
            "--negative-prompt y has no effect with --guidance-scale 1",
        ),
        (["--prompt", "x", "--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_wrong_input_is_one_line(tiny_folder, tmp_path, refused, flags, message):
    assert message in refused("generate", "--model", tiny_folder, "--output", tmp_path / "out", *flags)
    assert not list(tmp_path.glob("out/*.wav"))


def test_a_used_folder_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, refused):
    """Fault: minutes of loading a large model for an error that was there from the start."""
    (tmp_path / "song.wav").write_bytes(b"")
    monkeypatch.setattr(command, "_load", lambda *_: pytest.fail("loaded"))
    said = refused("generate", "--model", "nano", "--prompt", "a tune", "--output", tmp_path)
    assert "is not empty" in said


def test_a_missing_folder_is_said_first(tmp_path, refused):
    """Fault: a typing error answered with three formats of checkpoints."""
    said = refused("generate", "--model", "nothere", "--prompt", "a tune", "--output", tmp_path / "out")
    assert said.startswith("there is no folder nothere")
