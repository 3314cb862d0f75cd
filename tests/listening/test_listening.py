"""The listening test: blind, randomised, counted right, safe for several listeners, and resumable."""

import contextlib
import csv
import json
import multiprocessing
import time
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from socket import gethostname
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import soundfile
import yaml

from diverse_cfg.evaluation.cache import Cache
from diverse_cfg.evaluation.results import Results
from diverse_cfg.evaluation.systems import System, single
from diverse_cfg.listening.app import _build_app, _view, serve
from diverse_cfg.listening.doorkeeper import Doorkeeper
from diverse_cfg.listening.study import (
    KEY_FILE,
    VOTES_FILE,
    Vote,
    Votes,
    load_trials,
    make_study,
    win_rates,
)
from diverse_cfg.listening.webmushra import export_study, import_ratings
from tests.evaluation.worlds import save_sibling, small_sweep
from tests.faults import largest_file
from tests.tiny import PROMPTS, save_tiny


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    sweep = small_sweep(root)
    systems = [
        System("base", single(save_tiny(root / "a"))),
        System("student", single(save_sibling(root / "b"))),
        System("gone", single(root / "nowhere")),
    ]
    return sweep.run(systems, progress=False), sweep


@pytest.fixture
def study(evaluated, tmp_path):
    return make_study(*evaluated, tmp_path / "study", [("student", "base")], num_quality=4, num_diversity=3)


def key_of(study):
    return json.loads((study / KEY_FILE).read_text())


def test_a_study_asks_both_questions(study):
    trials = load_trials(study)
    assert sorted(trial.kind for trial in trials) == ["diversity"] * 3 + ["quality"] * 4
    for trial in trials:
        assert len(trial.left) == len(trial.right) == {"quality": 1, "diversity": 2}[trial.kind]
        assert trial.prompt in PROMPTS
        assert all((study / file).is_file() for file in (*trial.left, *trial.right))
    quality = [trial.prompt for trial in trials if trial.kind == "quality"]
    assert sorted(quality) == sorted(PROMPTS)


def test_nothing_but_the_key_names_a_system(study):
    """Catches a file name, a folder or a field that gives the answer away."""
    key = key_of(study)
    assert {name for sides in key.values() for name in sides.values()} == {"student", "base"}
    for path in study.rglob("*"):
        assert "student" not in path.name and "base" not in path.name
        if path.suffix == ".json" and path.name != KEY_FILE:
            assert "student" not in path.read_text() and "base" not in path.read_text()


def test_the_clips_are_those_of_the_key(study, evaluated):
    """Catches sides that are swapped in the key: the win rate would be that of the other system."""
    results, sweep = evaluated
    from diverse_cfg.evaluation.sweep import write_audio

    files = write_audio(results, sweep, study.parent / "page", 4, 2)
    for trial in load_trials(study):
        prompt = PROMPTS.index(trial.prompt)
        for side in ("left", "right"):
            system = key_of(study)[trial.id][side]
            copies = [(study / file).read_bytes() for file in getattr(trial, side)]
            originals = [(study.parent / "page" / file).read_bytes() for file in files[system, prompt]]
            assert copies == originals[: len(copies)]


def test_sides_are_random_and_repeatable(evaluated, tmp_path):
    def left_systems(name, seed):
        folder = make_study(
            *evaluated, tmp_path / name, [("student", "base")], num_quality=4, num_diversity=4, seed=seed
        )
        key = key_of(folder)
        return [(trial.id, key[trial.id]["left"]) for trial in load_trials(folder)]

    first = left_systems("one", 0)
    assert {system for _, system in first} == {"student", "base"}
    assert left_systems("two", 0) == first
    assert left_systems("three", 1) != first


def test_each_listener_has_an_order_of_their_own_and_goes_on_where_they_stopped(study):
    votes = Votes(study)
    anna, ben = votes.remaining("anna"), votes.remaining("ben")
    assert {trial.id for trial in anna} == {trial.id for trial in ben}
    assert [trial.id for trial in anna] != [trial.id for trial in ben]
    votes.add(Vote(anna[0].id, "anna", "left"))
    assert [trial.id for trial in Votes(study).remaining("anna")] == [trial.id for trial in anna[1:]]
    assert len(Votes(study).remaining("ben")) == 7


def test_one_answer_is_a_rate_without_interval(study):
    trial = load_trials(study)[0]
    Votes(study).add(Vote(trial.id, "anna", "same"))
    (rate,) = win_rates(study)
    assert (rate.rate.estimate, rate.rate.low) == (0.5, None)


def vote_all(study, answers):
    """Votes on all quality trials: `answers[listener](number)` is who wins, "student", "base" or "same"."""
    votes, key = Votes(study), key_of(study)
    trials = [trial for trial in load_trials(study) if trial.kind == "quality"]
    for listener, answer in answers.items():
        for number, trial in enumerate(trials):
            sides = {system: side for side, system in key[trial.id].items()} | {"same": "same"}
            votes.add(Vote(trial.id, listener, sides[answer(number)]))
    (rate,) = win_rates(study)
    return rate


def test_win_rate_counts_the_system_not_the_side(study):
    """The student wins 2 of 4 quality trials, ties one, loses one: (2 + ½)/4, whichever side it was on."""
    rate = vote_all(study, {"anna": ("student", "student", "same", "base").__getitem__})
    assert (rate.kind, rate.system, rate.other) == ("quality", "base", "student")
    assert (rate.wins, rate.ties, rate.losses) == (1, 1, 2)
    assert rate.rate.estimate == pytest.approx(1.5 / 4)
    assert rate.rate.low <= rate.rate.estimate <= rate.rate.high
    assert rate.rate.num_prompts == 4


def test_unanimous_votes_are_no_certainty(study):
    """Catches the interval [1, 1]. Clopper & Pearson, four of four: 0.025^(1/4) = 0.398."""
    rate = vote_all(study, {"anna": lambda _: "base"})
    assert (rate.rate.estimate, rate.rate.high) == (1.0, 1.0)
    assert rate.rate.low == pytest.approx(0.025 ** (1 / 4))
    # More votes on the same prompts are no more prompts.
    rate = vote_all(study, dict.fromkeys(("ben", "cleo"), lambda _: "base"))
    assert rate.rate.low == pytest.approx(0.025 ** (1 / 4))
    assert (rate.listeners, rate.new_listeners) == (3, False)


# Of four prompts: none won 1 − 0.025^(1/4); two won as in tables of Clopper & Pearson.
@pytest.mark.parametrize(
    ("winner", "interval"), [("student", (0.0, 0.0, 0.6024)), ("same", (0.5, 0.0676, 0.9324))]
)
def test_votes_that_all_agree_have_an_interval(study, winner, interval):
    rate = vote_all(study, {"anna": lambda _: winner}).rate
    assert (rate.estimate, rate.low, rate.high) == pytest.approx(interval, abs=1e-4)


def test_listeners_who_disagree_widen_the_interval(study):
    """Catches listeners that are kept fixed: the interval of four who contradict each other is not that of
    these four."""
    base, student = ["base"] * 3, ["student"] * 3
    # Of the last prompt two change their minds, so that prompts differ a little.
    answers = {"anna": [*base, "student"], "ben": [*base, "base"]}
    answers |= {"cleo": [*student, "student"], "dora": [*student, "base"]}
    rate = vote_all(study, {name: given.__getitem__ for name, given in answers.items()})
    assert (rate.rate.estimate, rate.listeners, rate.new_listeners) == (0.5, 4, True)
    assert rate.rate.low < 0.2 and rate.rate.high > 0.8


def test_listeners_who_stopped_early_are_kept_as_they_are(study):
    """Resampling listeners needs every answer of each: the count says for whom the interval holds."""
    votes = Votes(study)
    for name, count in (("anna", 4), ("ben", 4), ("cleo", 3)):
        trials = [trial for trial in load_trials(study) if trial.kind == "quality"][:count]
        for number, trial in enumerate(trials):
            votes.add(Vote(trial.id, name, "left" if number else "same"))
    (rate,) = win_rates(study)
    assert (rate.listeners, rate.new_listeners) == (3, False)


@pytest.mark.parametrize(
    ("trial", "listener", "answer", "message"),
    [
        ("nothing", "anna", "left", "no trial 'nothing'"),
        (None, "anna", "better", "answer='better'"),
        (None, " ", "left", "needs a listener"),
    ],
)
def test_wrong_votes_are_refused(study, trial, listener, answer, message):
    with pytest.raises(ValueError, match=message):
        Votes(study).add(Vote(trial or load_trials(study)[0].id, listener, answer))


def test_a_second_click_counts_once(study):
    trial, votes = load_trials(study)[0], Votes(study)
    votes.add(Vote(trial.id, "anna", "left"))
    with pytest.raises(ValueError, match=r"answered trial .* already"):
        votes.add(Vote(trial.id, "anna", "right"))
    votes.add(Vote(trial.id, "ben", "right"))
    assert len(votes.all()) == 2


@pytest.mark.parametrize(
    "line",
    [
        b'{"trial": "abc", "lis',
        '{"trial": "FIRST", "listener": "J\u00fc'.encode()[:-1],  # inside of a letter
        b"null",
        b"[1]",
        b"[" * 100_000,
        b'{"foo": 1}',
        b'{"trial": "FIRST", "listener": "ben", "answer": "up"}',
        b'{"trial": "FIRST", "listener": "ben", "answer": []}',
        b'{"trial": "FIRST", "listener": 5, "answer": "left"}',
        b'{"trial": "unknown", "listener": "ben", "answer": "left"}',
        b'{"trial": "FIRST", "listener": "anna", "answer": "right"}',  # twice
    ],
)
def test_a_bad_line_costs_itself_only(study, line):
    """Catches a file that one crash, or one edit by hand, makes unreadable for everybody."""
    first, second = load_trials(study)[:2]
    votes = Votes(study)
    votes.add(Vote(first.id, "anna", "left"))
    with open(study / VOTES_FILE, "ab") as file:
        file.write(line.replace(b"FIRST", first.id.encode()))
    with pytest.warns(UserWarning, match=r"votes\.jsonl: left out, .*: line 2 \("):
        votes.add(Vote(second.id, "anna", "right"))
    with pytest.warns(UserWarning, match="line 2"):
        assert votes.all() == [Vote(first.id, "anna", "left"), Vote(second.id, "anna", "right")]
    with pytest.warns(UserWarning, match="line 2"):
        assert sum(rate.wins + rate.losses for rate in win_rates(study)) == 2


@pytest.mark.parametrize("name", ["Jo\u2028e", "a\x85b", "J\u00fcrgen", "two\nlines", "\ud800", "\x1c"])
def test_any_name_votes_once(study, name):
    """Catches names that end a line for `splitlines`: their votes were lost, and could be cast again."""
    name = f"x{name}"
    trial, votes = load_trials(study)[0], Votes(study)
    votes.add(Vote(trial.id, name, "left"))
    assert votes.all() == [Vote(trial.id, name, "left")]
    assert len(votes.remaining(name)) == 6
    with pytest.raises(ValueError, match="already"):
        votes.add(Vote(trial.id, name, "right"))


def test_votes_with_letters_as_they_are_can_be_read(study):
    """Files of earlier versions, in UTF-8."""
    trial = load_trials(study)[0]
    line = json.dumps(
        {"trial": trial.id, "listener": "J\u00fcrgen\u2028", "answer": "left"}, ensure_ascii=False
    )
    (study / VOTES_FILE).write_text(line + "\n", encoding="utf-8")
    assert Votes(study).all() == [Vote(trial.id, "J\u00fcrgen\u2028", "left")]


def _vote_for_all(study, listener, barrier):
    votes = Votes(study)
    for trial in votes.trials:
        barrier.wait(60)
        with contextlib.suppress(ValueError):  # another window was faster
            votes.add(Vote(trial, listener, "same"))


@pytest.mark.parametrize("names", [["anna", "ben", "cleo", "dora"], ["anna"] * 4])
def test_listeners_at_once(study, names, monkeypatch):
    """Catches votes that are lost, and, without a lock, four windows of one listener that all count."""
    parse = Votes._parse

    def slowly(votes, content):  # between looking and writing
        time.sleep(0.02)
        return parse(votes, content)

    monkeypatch.setattr(Votes, "_parse", slowly)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(names))
    processes = [context.Process(target=_vote_for_all, args=(study, name, barrier)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert len(Votes(study).all()) == len(set(names)) * 7


@pytest.mark.parametrize(
    ("pairs", "quality", "diversity", "message"),
    [
        ([], 1, 1, "at least one pair"),
        ([("base", "base")], 1, 1, "with itself"),
        ([("base", "nobody")], 1, 1, "no system 'nobody'"),
        ([("base", "gone")], 1, 1, "'gone' failed"),
        ([("base", "student")], 9, 0, "9 quality trials"),
        ([("base", "student")], 0, 0, "no trials"),
    ],
)
def test_studies_that_cannot_be_made(evaluated, tmp_path, pairs, quality, diversity, message):
    with pytest.raises(ValueError, match=message):
        make_study(*evaluated, tmp_path / "study", pairs, num_quality=quality, num_diversity=diversity)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": (*PROMPTS[:2], "a trumpet", PROMPTS[3])},
            "prompt 3 of the configuration is 'a trumpet' and",
        ),
        ({"prompts": tuple(PROMPTS[:3])}, "prompt 4 of the configuration is None"),
        ({"num_generations": 4}, "num_generations is 4 in the configuration and 3 in the results"),
        ({"num_frames": 13}, r"num_frames \(clip_seconds\) is 13 in the configuration and 12"),
        ({"seeds": (1,)}, r"seeds is \[1\] in the configuration and \[0\]"),
    ],
)
def test_a_study_of_other_clips_than_were_measured_is_refused(evaluated, tmp_path, changes, message):
    """Catches the text of one prompt beside the audio of another: texts come from the results, audio from the
    configuration."""
    results, sweep = evaluated
    other = replace(sweep, clips=replace(sweep.clips, **changes))
    with pytest.raises(ValueError, match=message):
        make_study(results, other, tmp_path / "study", [("base", "student")], num_quality=2, num_diversity=0)
    assert not list(tmp_path.iterdir())


def test_a_study_generates_nothing(evaluated, tmp_path, monkeypatch):
    """Catches a study of new clips that nobody measured, when those of the evaluation are gone."""
    results, sweep = evaluated
    monkeypatch.setattr(
        "diverse_cfg.evaluation.generations.fast_generate", lambda *_, **__: pytest.fail("generated")
    )
    pairs = [("base", "student")]
    make_study(results, sweep, tmp_path / "study", pairs, num_quality=1, num_diversity=0)
    empty = replace(sweep, cache=Cache(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"clips of system 'base' are not in .*cache.* evaluate"):
        make_study(results, empty, tmp_path / "other", pairs, num_quality=1, num_diversity=0)
    assert not (tmp_path / "other").exists()


def test_a_model_that_was_written_over_is_not_heard_for_the_one_that_was_measured(evaluated, tmp_path):
    results, sweep = evaluated
    recorded = Results(
        results.prompts, results.systems, {**results.settings, "clips": {"student": ["before"]}}
    )
    with pytest.raises(ValueError, match=r"system 'student' is not what the results were made from"):
        make_study(recorded, sweep, tmp_path / "study", [("base", "student")], num_quality=1, num_diversity=0)


def test_a_study_is_never_written_over(study, evaluated):
    with pytest.raises(FileExistsError, match="study exists already: choose another output"):
        make_study(*evaluated, study, [("base", "student")], num_quality=1, num_diversity=0)


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_shows_one_trial_after_the_other(study):
    votes = Votes(study)
    seen = []
    while (now := _view(votes, " anna ")).trial:
        assert f"### {len(seen) + 1} of 7" in now.text and now.trial.prompt in now.text
        assert all(path.startswith(str(study.resolve())) for path in now.left + now.right)
        seen.append(now.trial.id)
        votes.add(Vote(now.trial.id, "anna", "left"))
    assert len(set(seen)) == 7
    assert "Thank you, anna" in now.text
    with pytest.raises(ValueError, match="enter a name"):
        _view(votes, " ")


def test_without_gradio_the_page_says_what_to_install(study, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ImportError, match=r"'\.\[listen\]'"):
        _build_app(study)


def test_lists_that_were_damaged_are_named(study):
    """Fault: tracebacks of a study that was edited, or copied in part."""
    key, trials = study / KEY_FILE, study / "trials.json"
    for path, content in (
        (key, "[" * 100_000),
        (key, "{}"),
        (trials, "[" * 100_000),
        (trials, '[{"id": 1}]'),
    ):
        kept = path.read_text()
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"{path.name} is not .*copy"):
            win_rates(study)
        path.write_text(kept)
    assert win_rates(study) == []


def test_a_click_is_a_vote(study):
    """The page's own functions, called as gradio calls them."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    app = _build_app(study)
    functions = [function.fn for function in app.fns.values()]
    show, left = functions[0], functions[2]
    trial, text, *rest = show("anna")
    assert "1 of 7" in text and [update["visible"] for update in rest[-3:]] == [True] * 3
    kind = next(one.kind for one in load_trials(study) if one.id == trial)
    visible = [update["visible"] for update in rest[:4]]
    assert visible == ([True, False] * 2 if kind == "quality" else [True] * 4)
    _, text, *_ = left("anna", trial)
    assert "2 of 7" in text
    assert Votes(study).all() == [Vote(trial, "anna", "left")]


def require_guarded(port):
    """Faults: uploads of any size, any Host header (a site that points its name here), votes by other sites."""
    config, upload = ("GET", "/config"), ("POST", "/gradio_api/upload")
    join = ("POST", "/gradio_api/queue/join")
    for request, headers, body, wanted in (
        (config, {}, None, 200),
        (config, {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, None, 200),
        (config, {"Host": f"[::1]:{port}"}, None, 200),
        (config, {"Host": "evil.example"}, None, 403),
        (config, {"Host": f"10.0.0.7:{port}"}, None, 403),
        (config, {"Host": "127.0.0.1.evil.example"}, None, 403),
        (config, {"Host": "[::1"}, None, 403),
        (config, {"Host": ""}, None, 403),
        (config, {"Origin": "http://evil.example"}, None, 403),
        (config, {"Origin": "null"}, None, 403),
        (upload, {}, b"x", 403),
        (("POST", "/gradio_api//upload/"), {}, b"x", 403),
        (join, {"Content-Length": str(10**9)}, None, 413),
        (join, {"Transfer-Encoding": "chunked"}, None, 413),
        (join, {}, b"{}", 422),  # gradio's own answer
    ):
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest(*request, skip_host="Host" in headers)
        for name, value in ({} if body is None else {"Content-Length": str(len(body))} | headers).items():
            connection.putheader(name, value)
        for name, value in (headers if body is None else {}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        assert connection.getresponse().status == wanted, (request, headers)
        connection.close()


@pytest.mark.parametrize(
    ("host", "names", "asked", "welcome"),
    [
        ("0.0.0.0", [], "192.168.0.7:7860", True),
        ("0.0.0.0", [], gethostname(), True),
        ("0.0.0.0", [], "evil.example", False),
        ("127.0.0.1", ["study.example"], "Study.example", True),
        ("127.0.0.1", [], gethostname() + ".evil.example", False),
    ],
)
def test_the_page_answers_to_its_names(host, names, asked, welcome):
    """A browser never takes an address for another site's name, so that addresses are safe."""
    scope = {"type": "http", "path": "/", "headers": [(b"host", asked.encode())]}
    assert (Doorkeeper(None, host, names)._refusal(scope) is None) == welcome


def test_the_page_is_served_and_keeps_its_key(study, monkeypatch):
    """Catches a page that gradio cannot serve, and a listener who can read which system is which."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client

    launch, served = gradio.Blocks.launch, []

    def launched(app, server_port, **options):
        served.append((app, launch(app, prevent_thread_lock=True, quiet=True, **options)))

    monkeypatch.setattr(gradio.Blocks, "launch", launched)
    serve(study)
    [(app, (_, url, _))] = served
    Votes(study).add(Vote(load_trials(study)[0].id, "ben", "left"))
    try:
        client = Client(url, verbose=False)
        text, first, *_ = client.predict("anna", api_name="/show")
        assert "1 of 7" in text and Path(first["value"]).read_bytes().startswith(b"RIFF")
        answers = {}
        for path in (study / KEY_FILE, study / VOTES_FILE, next((study / "audio").iterdir())):
            try:
                answers[path.name] = urlopen(f"{url}gradio_api/file={path.resolve()}", timeout=10).status
            except HTTPError as error:
                answers[path.name] = error.code
        assert list(answers.values()) == [403, 403, 200]
        require_guarded(int(url.rstrip("/").rpartition(":")[2]))
    finally:
        app.close()


# ---- webMUSHRA -----------------------------------------------------------------------------------


def test_the_webmushra_configuration_is_complete(study, tmp_path):
    path = export_study(study, tmp_path / "package", "pilot")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "package" / "configs" / "pilot.yaml"
    assert (config["testId"], config["remoteService"]) == ("pilot", "service/write.php")
    assert [page["type"] for page in (config["pages"][0], config["pages"][-1])] == ["generic", "finish"]
    order, *pages = config["pages"][1]
    assert order == "random"
    trials = {trial.id: trial for trial in load_trials(study)}
    assert {page["id"] for page in pages} == set(trials)
    for page in pages:
        assert page["type"] == "likert_multi_stimulus" and len(page["response"]) == 5
        clip = soundfile.info(study / trials[page["id"]].left[0])
        for file in page["stimuli"].values():
            frames = soundfile.info(tmp_path / "package" / file).frames
            pair = trials[page["id"]].kind == "diversity"
            assert frames == (2 * clip.frames + clip.samplerate if pair else clip.frames)
    assert "student" not in path.read_text()
    with pytest.raises(FileExistsError):
        export_study(study, tmp_path / "package", "pilot")


def test_a_full_disk_leaves_nothing_that_is_taken_for_whole(study, tmp_path):
    """Catches half a package, which the next export refuses, and a vote that is lost without a file's name."""
    vote = Vote(load_trials(study)[0].id, "anna", "left")
    with largest_file(16):
        with pytest.raises(OSError, match=r"package.*wav cannot be written: the disk took less"):
            export_study(study, tmp_path / "package", "pilot")
        with pytest.raises(OSError, match=r"votes.* cannot be written: it is too large"):
            Votes(study).add(vote)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study"]
    Votes(study).add(vote)  # what was cut off does not count
    assert Votes(study).all() == [vote]


def write_ratings(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["session_test_id", "name", "trial_id", "stimuli_rating", "stimuli", "rating_time"])
        writer.writerows(["pilot", *row, "1000"] for row in rows)
    return path


def test_ratings_become_votes(study, tmp_path):
    """The higher rating is the vote; equal ones are a tie; a file that is read twice counts once."""
    a, b, c = (trial.id for trial in load_trials(study)[:3])
    rows = [
        ("anna", a, " 4 ", "left"),
        ("anna", a, " 2 ", "right"),
        ("anna", b, " 3 ", "right"),
        ("anna", b, " 3 ", "left"),
        ("ben", a, " 1 ", "left"),
        ("ben", a, " 5 ", "right"),
    ]
    path = write_ratings(tmp_path / "lms.csv", rows)
    assert import_ratings(study, path) == 3
    assert {(vote.trial, vote.listener): vote.answer for vote in Votes(study).all()} == {
        (a, "anna"): "left",
        (b, "anna"): "same",
        (a, "ben"): "right",
    }
    write_ratings(path, [*rows, ("ben", c, "2", "left"), ("ben", c, "1", "right")])
    assert import_ratings(study, path) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("anna", "unknown", "3", "left"), ("anna", "unknown", "3", "right")], "another study"),
        ([("anna", None, "3", "left")], "not both sides"),
        ([("anna", None, "NA", "left")], "line 2: 'NA' is no rating"),
        (
            [("anna", None, "9", "left"), ("anna", None, "-4", "right")],
            "line 2: '9' is no rating from 1 to 5",
        ),
        ([("anna", None, "0", "left"), ("anna", None, "1", "right")], "line 2: '0' is no rating"),
        ([("", None, "3", "left")], "names no listener"),
    ],
)
def test_ratings_that_cannot_be_used(study, tmp_path, rows, message):
    """Nothing of such a file is added, the good ratings at its end neither."""
    trial, other = (trial.id for trial in load_trials(study)[:2])
    good = [("ben", other, "1", "left"), ("ben", other, "2", "right")]
    rows = [(who, name or trial, *rest) for who, name, *rest in rows]
    for number, order in enumerate((rows + good, good + rows)):
        path = write_ratings(tmp_path / "lms.csv", order)
        with pytest.raises(ValueError, match=message.replace("line 2", f"line {2 + 2 * number}")):
            import_ratings(study, path)
    assert Votes(study).all() == []
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for damage in (b"\xff", b"x" * 200_000):
        damaged = tmp_path / "damaged.csv"
        damaged.write_bytes(write_ratings(path, good).read_bytes() + damage)
        with pytest.raises(ValueError, match=r"damaged.csv cannot be read \(.*copy lms.csv"):
            import_ratings(study, damaged)
    with pytest.raises(ValueError, match=r"no lms.csv"):
        import_ratings(study, tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 200_000 + b",b\n", "cannot be read"),
        (b"session_test_id,name\n\xff,1\n", "cannot be read|lacks the columns"),
        (
            b"session_test_id,name,trial_id,stimuli_rating,stimuli,rating_time\na,b,c,2,left,1,1\n",
            "more cells",
        ),
    ],
)
def test_ratings_that_are_no_table(study, tmp_path, content, message):
    (tmp_path / "lms.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_ratings(study, tmp_path / "lms.csv")
