"""Prompt files of every format give the same prompts, and every bad file is refused by name and row."""

import gzip
import json
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from diverse_cfg.prompts import load_prompts
from tests.faults import without_privileges

PROMPTS = ["a calm piano song", 'flute, "fast", in D', "ein trauriges Lied für Cello"]
KEYS = ["C", "D", "e"]


FRAME = pd.DataFrame({"prompt": PROMPTS, "key": KEYS})
RECORDS = {"orient": "records", "force_ascii": False}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("p.csv", lambda path: FRAME.to_csv(path, index=False, encoding="utf-8-sig")),  # as spreadsheets do
        ("p.jsonl", lambda path: FRAME.to_json(path, **RECORDS, lines=True)),
        ("p.v2.jsonl.gz", lambda path: FRAME.to_json(path, **RECORDS, lines=True)),
        ("p.JSON", lambda path: FRAME.to_json(path, orient="records")),
        ("p.parquet", lambda path: FRAME.to_parquet(path)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_keeps_prompts_and_other_columns(tmp_path, name, write):
    """Catches quoting, encoding and byte-order-mark faults, and columns that get lost."""
    write(tmp_path / name)
    for source in (tmp_path / name, str(tmp_path / name)):
        dataset = load_prompts(source)
        assert dataset.column_names == ["prompt", "key"]
        assert list(dataset["prompt"]) == PROMPTS
        assert list(dataset["key"]) == KEYS


def test_text_is_one_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("\n\n".join(PROMPTS) + "\n  \n", encoding="utf-8")
    assert list(load_prompts(tmp_path / "p.txt")["prompt"]) == PROMPTS


ODD = "a\u2028calm\u2029slow\x85piano\x0csong\x0b\x1cin d"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", json.dumps({"prompt": ODD}, ensure_ascii=False) + '\r\n"second"\n'),
        ("p.txt", f"{ODD}\r\nsecond\n"),
        ("p.txt", f"{ODD}\rsecond"),
        ("p.csv", f"prompt\n{ODD}\r\nsecond\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_only_ends_of_lines_end_a_line(tmp_path, name, content, encoding):
    """Fault: `splitlines` cuts a prompt at characters that texts contain."""
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert list(load_prompts(tmp_path / name)["prompt"]) == [ODD, "second"]


SET = Dataset.from_dict({"prompt": PROMPTS, "key": KEYS})


@pytest.mark.parametrize(
    "source",
    [
        SET,
        DatasetDict(test=SET.select([0]), train=SET),
        FRAME.set_index(np.array([7, 8, 9])),
        pa.table({"prompt": PROMPTS, "key": KEYS}),
        {"prompt": np.array(PROMPTS), "key": tuple(KEYS)},
        SET.to_list(),
    ],
    ids=lambda source: type(source).__name__,
)
def test_tables_keep_their_rows_and_columns(source):
    """Fault: a DataFrame's or a dict's column names are trained on as prompts."""
    assert load_prompts(source).to_list() == SET.to_list()


@pytest.mark.parametrize(
    "source",
    [PROMPTS, tuple(PROMPTS), iter(PROMPTS), np.array(PROMPTS), FRAME["prompt"], SET["prompt"]],
    ids=lambda source: type(source).__name__,
)
def test_plain_texts_of_every_container(source):
    assert load_prompts(source).to_list() == [{"prompt": prompt} for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (set(PROMPTS), "the set is no source of prompts"),
        (b"a song", "the bytes, row 1: expected a string or an object, found int"),
        (np.array("a song"), "the ndarray is no source of prompts"),
        (3, "the int is no source of prompts"),
        (SET.to_iterable_dataset(), "is a stream: pass it to the trainer"),
        (DatasetDict(test=SET), "the DatasetDict has the splits test, not 'train'"),
        (
            FRAME.rename(columns={"prompt": "caption"}),
            "only 'caption', 'key'; choose one with column='caption'",
        ),
        (pd.DataFrame({"prompt": ["a", float("nan")]}), "row 2: a prompt is a string, found NoneType"),
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "the DataFrame cannot be read: Duplicate"),
        (pa.table([["a"], ["b"]], names=["prompt", "prompt"]), "has the column 'prompt' twice"),
        ({"prompt": "a song"}, "column 'prompt' is a str; pass a list"),
        ({"prompt": ["a"], "key": []}, "the dict: a column .* expected length 1"),
        (np.array([PROMPTS]), "row 1: expected a string or an object, found list"),
        ([b"a song"], "row 1: expected a string or an object, found bytes"),
        ([{"prompt": float("nan")}], "row 1: a prompt is a string, found float"),
        (["\ud800"], "the list: a column .* surrogates"),
    ],
)
def test_objects_that_hold_no_prompts_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


@pytest.mark.parametrize("column", ["caption", "text", "description"])
def test_a_caption_column_is_used_only_when_named(tmp_path, column):
    """A guess could train on the wrong text for hours: it is suggested, not made."""
    (tmp_path / "p.jsonl").write_text(json.dumps({column: "a song", "id": 3}) + "\n")
    with pytest.raises(
        ValueError, match=rf"no column 'prompt', only '{column}', 'id'; choose .*column='{column}'"
    ):
        load_prompts(tmp_path / "p.jsonl")
    dataset = load_prompts(tmp_path / "p.jsonl", column=column)
    assert dataset[0] == {"prompt": "a song", "id": 3}


def test_the_named_column_wins_over_prompt(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "short", "caption": "long"}\n')
    assert load_prompts(tmp_path / "p.jsonl", column="caption")[0] == {"prompt": "long"}


def test_a_folder_gives_the_split_that_is_asked_for(tmp_path):
    """Catches training on the held-out prompts."""
    (tmp_path / "train.txt").write_text("seen")
    (tmp_path / "test.jsonl").write_text('{"caption": "held out"}')
    (tmp_path / "README.md").write_text("not prompts")
    assert list(load_prompts(tmp_path)["prompt"]) == ["seen"]
    assert list(load_prompts(tmp_path, split="test", column="caption")["prompt"]) == ["held out"]
    with pytest.raises(
        FileNotFoundError, match=r"\(validation\.txt.*; prompt files there: test\.jsonl, train\.txt"
    ):
        load_prompts(tmp_path, split="validation")
    (tmp_path / "train.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.txt"):
        load_prompts(tmp_path)


def test_a_folder_with_one_file_needs_no_split_name(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt\na song\n")
    assert list(load_prompts(tmp_path)["prompt"]) == ["a song"]


def test_saved_datasets(tmp_path):
    splits = {name: Dataset.from_dict({"prompt": [name]}) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    splits["test"].save_to_disk(tmp_path / "one")
    assert list(load_prompts(tmp_path / "both", split="test")["prompt"]) == ["test"]
    assert list(load_prompts(tmp_path / "one")["prompt"]) == ["test"]
    with pytest.raises(ValueError, match="splits train, test, not 'dev'"):
        load_prompts(tmp_path / "both", split="dev")


@pytest.mark.parametrize("absolute", [True, False])
def test_an_audiocraft_manifest_reads_the_captions_beside_the_audio(tmp_path, absolute):
    audio = tmp_path / "songs" / "one.v2.wav"
    audio.parent.mkdir()
    audio.with_suffix(".json").write_text(json.dumps({"description": "a song", "title": "One"}))
    path = str(audio if absolute else audio.relative_to(tmp_path))
    row = {"path": path, "duration": 3.0, "sample_rate": 32000, "amplitude": None, "weight": None}
    manifest = tmp_path / "data.jsonl.gz"
    manifest.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert load_prompts(manifest)[0] == {"prompt": "a song", "path": path}
    assert load_prompts(tmp_path, column="title")[0] == {"prompt": "One", "path": path}
    with pytest.raises(ValueError, match=r"one\.v2\.json has no 'mood'; name the key"):
        load_prompts(manifest, column="mood")
    audio.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"caption file .*one\.v2\.json does not exist"):
        load_prompts(manifest)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b'prompt,key\na,C\n" ",D\n', "row 2: empty prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', "row 2: empty prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"key": "C"}\n', "row 2: a prompt is a string, found NoneType"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"p\.jsonl, line 3: not JSON"),
        ("p.jsonl", b'"a"\n3\n', "row 2: expected a string or an object, found int"),
        ("p.json", b'{"prompt": "a"}', "must hold a list"),
        ("p.json", b'[{"prompt": "a"}, {"prompt": 3}]', "mixes types"),
        (
            "p.json",
            b'[{"prompt": [{"role": "user", "content": "a"}]}]',
            "row 1: a prompt is a string, found list",
        ),
        ("p.csv", b"prompt,key\na,b,c\n", "line 2: 3 cells do not match the header"),
        ("p.csv", b"prompt,key\na\n", "line 2: 1 cells do not match the header"),
        ("p.csv", b"prompt\n", "has no prompts"),
        ("p.txt", b"\n", "has no prompts"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.txt", "a calm song".encode("utf-16-le"), "NUL characters: save it as UTF-8"),
        ("p.csv", "prompt\na".encode("utf-16-be"), "NUL characters: save it as UTF-8"),
        ("p.txt.gz", b"plain", "no complete gzip file"),
        ("p.txt.gz", gzip.compress(b"a song\n" * 99, mtime=0)[:-9], "no complete gzip file"),
        ("p.csv", b"prompt\n" + b"a" * 200_000, "after line 1: field larger than field limit"),
        ("p.csv", b'prompt,key\na,C\n"b,D\nc,E\n', "after line 2: unexpected end of data; a quote"),
        ("p.csv", b'prompt,key\na,C\n"b,D\nc","E\nd,F\n', "after line 2: .*; a quote"),
        ("p.csv", b"prompt;key\na, slow;C\n", "single column 'prompt;key': separate columns by commas"),
        ("p.csv", b"prompt\tkey\na\tC\n", "single column .*: separate columns by commas"),
        ("p.csv", b"prompt,prompt\na,b\n", "column 'prompt' twice"),
        ("p.jsonl", b'"x"\n{"prompt": "a", "prompt": "b"}\n', "line 2: JSON .*'prompt' twice"),
        ("p.json", b"[" * 100_000, "JSON that cannot be read .*recursion"),
        (
            "p.jsonl",
            b'{"prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
            "cannot be stored .*recursion",
        ),
        ("p.json", b'[{"prompt": ' + b"9" * 5000 + b"}]", "JSON that cannot be read .*digits"),
        ("p.jsonl", b'{"prompt": NaN}', "row 1: a prompt is a string, found float"),
        ("p.jsonl", b'{"path": 3, "duration": 1, "sample_rate": 2}', "path 3; it must name an audio file"),
        ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a pointer of Git LFS"),
        ("p.parquet", b"PAR1", "cannot be read: Parquet file size"),
        ("p.wav", b"RIFF", "unknown prompt format; use one of"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="privileges are Linux's")
def test_a_file_that_may_not_be_read_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a song")
    path.chmod(0)
    with without_privileges(), pytest.raises(PermissionError, match=r"p\.txt may not be read.*permissions"):
        load_prompts(path)


@pytest.mark.parametrize(
    "source", ["nowhere.csv", "./nowhere", "/no/such/folder", "a/b/c", "prompts/train.jsonl.gz"]
)
def test_a_missing_path_is_not_taken_for_a_hub_id(source):
    with pytest.raises(FileNotFoundError, match="no prompt file or folder"):
        load_prompts(source)


def test_an_unreachable_hub_id_says_both_things_it_could_have_been():
    with pytest.raises(
        FileNotFoundError, match="'someone/prompts' is neither a local file nor a reachable Hub dataset"
    ):
        load_prompts("someone/prompts")


@pytest.mark.parametrize("prompts", [[], [""], ["a", None]])
def test_bad_lists(prompts):
    with pytest.raises(ValueError, match="the list"):
        load_prompts(prompts)


def test_a_split_of_what_has_none_is_refused(tmp_path):
    """Fault: training prompts that pass for held-out ones, since a split that does not exist is ignored."""
    (tmp_path / "p.txt").write_text("a song")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "prompts.txt").write_text("a song")
    SET.save_to_disk(tmp_path / "saved")
    sources = [
        tmp_path / "p.txt",
        tmp_path / "folder",
        tmp_path / "saved",
        SET,
        FRAME,
        {"prompt": PROMPTS},
        PROMPTS,
    ]
    for source in sources:
        with pytest.raises(ValueError, match=r"split='test': .* has no splits; leave it out"):
            load_prompts(source, split="test")
        assert len(load_prompts(source)) == len(load_prompts(source, split="test", default_split="test"))
    named = Dataset.from_dict({"prompt": PROMPTS}, split="test")
    assert len(load_prompts(named, split="test")) == 3, "a dataset that knows to be this split"


def test_all_shards_of_a_split_are_read(tmp_path):
    """Fault: half of the prompts pass for all of them."""
    for number, prompt in enumerate(PROMPTS[:2]):
        table = Dataset.from_dict({"prompt": [prompt]})
        table.to_parquet(tmp_path / f"train-{number:05d}-of-00002.parquet")
    (tmp_path / "test.txt").write_text("held out")
    assert list(load_prompts(tmp_path)["prompt"]) == PROMPTS[:2]
    assert list(load_prompts(tmp_path, split="test")["prompt"]) == ["held out"]
    (tmp_path / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs one prompt file named after the split \(test\.txt"):
        load_prompts(tmp_path, split="test", default_split="test")
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="lacks shard 00001 of the 2 of train: copy"):
        load_prompts(tmp_path)
    (tmp_path / "train-00000-of-00002.parquet").rename(tmp_path / "songs-00000-of-00001-0af.parquet")
    assert list(load_prompts(tmp_path)["prompt"]) == PROMPTS[:1]


def test_an_empty_table_has_no_prompts(tmp_path):
    """Fault: "BatchSize must be greater than 0"."""
    Dataset.from_dict({"prompt": ["a"]}).select([]).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet cannot be read: it has no prompts"):
        load_prompts(tmp_path / "p.parquet")


def test_an_empty_name_is_not_this_folder(tmp_path, monkeypatch):
    """Fault: `--prompts "$PROMPTS"` without the variable takes the only file that lies here."""
    (tmp_path / "other.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name of the prompts is empty"):
        load_prompts("")


def test_a_slice_of_a_file_is_refused(tmp_path):
    """Fault: all of the file, where its first row was asked for."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    for source in (tmp_path / "p.txt", tmp_path):
        with pytest.raises(ValueError, match=r"split='train\[:1\]' is a slice, .* into a file of their own"):
            load_prompts(source, split="train[:1]")
