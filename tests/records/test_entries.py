"""Readers of annotation files, compared with the standard library, with chunks of every size."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynfocus_jax.errors import UserError
from dynfocus_jax.records import entries
from dynfocus_jax.records.entries import (
    InvalidEntry,
    csv_entries,
    json_line_entries,
    json_list_entries,
    read_json,
)


def write(tmp_path, content, name="a.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(reader, path, *arguments):
    """Return the entries, and the reasons of invalid ones in their place."""
    numbers, values = zip(*reader(path, *arguments), strict=True)
    assert numbers == tuple(range(len(numbers)))
    return [str(value) if isinstance(value, InvalidEntry) else value for value in values]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("entries")


@pytest.fixture(autouse=True)
def _chunk():
    """Restore the chunk size, which tests change."""
    chunk = entries._CHUNK
    yield
    entries._CHUNK = chunk


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(['"', "\\", '\\"', "[", "},{", '"]', "\\u0041", "é", "\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@example([0.5, 1e300, -1.0], 1, None, True)
@example([12, 345], 1, None, True)
@given(st.lists(VALUES, max_size=5), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_lists_equal_those_of_the_json_module(folder, values, chunk, indent, ascii_only):
    entries._CHUNK = chunk
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path = folder / "list.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    found = [value for _, value in json_list_entries(path)]
    assert json.dumps(found) == json.dumps(json.loads(path.read_text("utf-8", "surrogateescape")))


BROKEN = [
    "{'id': 1}",
    '{"id": }',
    '{"a": [1, 2,]}',
    "nonsense",
    '{"a": tru, "b": "}, {"}',
    "1" * 10_000,  # more digits than Python parses
    '{"a": "\t"}',  # a bare control character
]


@settings(deadline=None)
@given(st.lists(st.sampled_from([None, *BROKEN]), min_size=1, max_size=5), st.integers(1, 2000))
def test_a_broken_value_does_not_affect_the_others(folder, pattern, chunk):
    entries._CHUNK = chunk
    good = '{"id": "x", "text": "[}\\"{"}'
    path = write(folder, "[" + ", ".join(good if each is None else each for each in pattern) + "]\n")
    found = [value for _, value in json_list_entries(path)]
    assert len(found) == len(pattern)
    for value, each in zip(found, pattern, strict=True):
        if each is None:
            assert value == json.loads(good)
        else:
            assert isinstance(value, InvalidEntry)
            assert str(value).startswith("is not JSON (")
            assert len(str(value)) < 150


def test_deeply_nested_value(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    assert read(json_list_entries, write(tmp_path, f"[1, {deep}, 2]")) == [1, "is nested too deeply", 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("{", r"starts with '\{', expected a JSON list"),
        (
            '{"a": 1}',
            r"starts with '\{', expected a JSON list '\[...\]'; a file with one record per line needs the "
            r"suffix \.jsonl",
        ),
        ("null", "starts with 'n'"),
        ("[", "ends within the list, at record 0"),
        (
            '[{"a": 1}',
            "ends within the list, at record 0; check that the file is complete and that the record is JSON",
        ),
        ('[{"a": 1} ', "ends within the list, at record 0"),
        ('[{"a": 1},', "ends within the list, at record 1"),
        ('[{"a": 1}, {"b": "never closed}]', "ends within the list, at record 1"),
        ('[{"a": 1} {"b": 2}]', r"'\{' follows record 0, expected ','"),
        ("[1, 2] 3", "there is text after the list"),
    ],
)
def test_files_that_are_not_lists(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=message) as error:
        list(json_list_entries(path))
    assert str(path) in str(error.value)


def test_unreadable_files(tmp_path):
    for reader in (json_list_entries, json_line_entries, lambda path: csv_entries(path, ())):
        with pytest.raises(UserError, match="No such file"):
            list(reader(tmp_path / "none.json"))
        with pytest.raises(UserError, match="Is a directory"):
            list(reader(tmp_path))


def test_byte_order_mark_and_invalid_utf8(tmp_path):
    assert read(json_list_entries, write(tmp_path, b'\xef\xbb\xbf["a"]')) == ["a"]
    assert read(json_list_entries, write(tmp_path, b'["a\xff", "b"]')) == ["a\udcff", "b"]


def test_lines(tmp_path):
    content = '{"a":\r1}\n\n[2]\n{"a": }\r\n  \n' + "[" * 100_000 + '\n"end"'
    assert read(json_line_entries, write(tmp_path, content, "a.jsonl")) == [
        {"a": 1},
        [2],
        "is not JSON (Expecting value)",
        "is nested too deeply",
        "end",
    ]


def test_long_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "_MAX_LINE", 20)
    for length, valid in ((19, True), (20, False), (500, False)):
        content = json.dumps("x" * (length - 2)) + "\n" + json.dumps("next") + "\n"
        first, second = read(json_line_entries, write(tmp_path, content, "a.jsonl"))
        assert first == ("x" * (length - 2) if valid else "is a line of more than 20 characters"), length
        assert second == "next"


COLUMNS = ("id", "name")


def test_rows(tmp_path):
    content = 'x,id,name\n1,a,"two\nlines, ""quoted"""\n\n2,b\n3,c,d,e\n4,"e"f,g\n5,h,é\n6,"a\rb",i\n'
    assert read(csv_entries, write(tmp_path, content), COLUMNS) == [
        {"x": "1", "id": "a", "name": 'two\nlines, "quoted"'},
        "has 2 columns, expected 3 as in the header",
        "has 4 columns, expected 3 as in the header",
        "is not CSV in lines 7 to 7 (',' expected after '\"')",
        {"x": "5", "id": "h", "name": "é"},
        {"x": "6", "id": "a\rb", "name": "i"},
    ]


def test_row_with_an_open_quote(tmp_path):
    content = 'id,name\na,"open\n' + "b,b\n" * 50_000 + "c,c\n"
    found = read(csv_entries, write(tmp_path, content), COLUMNS)
    first = found[0]
    assert first.startswith("is not CSV in lines 2 to 32")
    assert "field larger than field limit" in first
    lost = int(first.split(" to ")[1].split()[0]) - 2
    assert len(found) == 1 + 50_000 - lost + 1
    assert found[-1] == {"id": "c", "name": "c"}


def test_row_with_a_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "_MAX_LINE", 1000)
    content = "id,name\na," + "x," * 5000 + "\nb,c\n"
    first, second = read(csv_entries, write(tmp_path, content), COLUMNS)
    assert "columns, expected 2" in first
    assert second == {"id": "b", "name": "c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no column 'id'"),
        ("id;name\na;b\n", "the header 'id;name' has no column 'id', expected id, name"),
        ('"id,name\n', "not CSV"),
    ],
)
def test_headers(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        list(csv_entries(write(tmp_path, content), COLUMNS))


def test_read_json(tmp_path):
    assert read_json(write(tmp_path, '{"a": 1}')) == {"a": 1}
    for content in ("{", "[" * 100_000):
        with pytest.raises(UserError, match="not JSON"):
            read_json(write(tmp_path, content))
