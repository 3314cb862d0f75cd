"""A YAML file of settings: numbers, names and types as they were meant, or an error that names them."""

import pytest

from diverse_cfg.settings import read_settings


def read(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    return read_settings(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3.0e-4", 3e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("-.inf", -float("inf")),
        ("1_000", 1000),
        ("0x10", 16),
        ("-7", -7),
        ("0", 0),
        ("0:1:0.05", "0:1:0.05"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("1e-4 of it", "1e-4 of it"),
        ("3e5x", "3e5x"),
        ("1.2.3", "1.2.3"),
        ("'8'", "8"),
        ("yes", True),
        ("null", None),
    ],
)
def test_a_value_is_what_it_looks_like(tmp_path, text, value):
    """Fault: a sweep in base 60, an octal count, a learning rate that is text."""
    found = read(tmp_path, f"a: {text}\n")["a"]
    assert found == value and type(found) is type(value)


def test_anchors_and_merges_may_overrule(tmp_path):
    """Fault: what a merge brings, and the file then sets otherwise, taken for a name that stands twice."""
    text = "one: &one {a: 1, b: 2}\ntwo: &two {<<: *one, a: 3}\nthree: {<<: *two, b: 4}\n"
    values = read(tmp_path, text)
    assert values["two"] == {"a": 3, "b": 2} and values["three"] == {"a": 3, "b": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"a is set twice: keep one\n.*s.yaml.*line 2"),
        ("s: [{n: 1, n: 1}]\n", "n is set twice"),
        ("null: 1\n", "the name 'null' is not text"),
        ("? [a]\n: 1\n", "is not text"),
        ("", "not a NoneType"),
        ("a: !!python/object:os.system {}\n", "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),
    ],
)
def test_a_file_with_a_trap_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_a_file_of_another_encoding_is_named(tmp_path):
    (tmp_path / "s.yaml").write_bytes("a: ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"s\.yaml is not UTF-8 text"):
        read_settings(tmp_path / "s.yaml")
