"""Prompt files of every format give the same prompts, and every bad file is refused by name and row."""

import csv
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from diverse_cfg.prompts import load_prompts

PROMPTS = ["a calm piano song", 'flute, "fast", in D', "ein trauriges Lied für Cello"]
KEYS = ["C", "D", "e"]


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets save it
        rows = csv.writer(file)
        rows.writerow(["prompt", "key"])
        rows.writerows(zip(PROMPTS, KEYS, strict=True))


def write_jsonl(path):
    rows = [
        json.dumps({"prompt": p, "key": k}, ensure_ascii=False) for p, k in zip(PROMPTS, KEYS, strict=True)
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_jsonl_gz(path):
    rows = [json.dumps({"prompt": p, "key": k}) for p, k in zip(PROMPTS, KEYS, strict=True)]
    path.write_bytes(gzip.compress("\n".join(rows).encode()))


def write_json(path):
    path.write_text(json.dumps([{"prompt": p, "key": k} for p, k in zip(PROMPTS, KEYS, strict=True)]))


def write_parquet(path):
    Dataset.from_dict({"prompt": PROMPTS, "key": KEYS}).to_parquet(str(path))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("p.csv", write_csv),
        ("p.jsonl", write_jsonl),
        ("p.v2.jsonl.gz", write_jsonl_gz),
        ("p.JSON", write_json),
        ("p.parquet", write_parquet),
    ],
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


def test_lists_and_datasets_pass_through():
    assert list(load_prompts(PROMPTS)["prompt"]) == PROMPTS
    assert list(load_prompts(Dataset.from_dict({"prompt": PROMPTS}))["prompt"]) == PROMPTS


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
        ("p.txt.gz", b"plain", "not UTF-8 text"),
        ("p.wav", b"RIFF", "unknown prompt format; use one of"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


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
