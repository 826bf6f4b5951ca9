"""JSON whatever its layout: what is read, and what is one clear error."""

import io
import json
from pathlib import Path

import pytest

from mlx_openelm.data import json_records
from mlx_openelm.data.json_records import BrokenLines, json_objects
from mlx_openelm.errors import DataError

RECORDS = [{"text": f"Number {n}"} for n in range(6)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def read(text, limit=10):
    broken = BrokenLines(Path("a.jsonl"), limit)
    return [record for _, record in json_objects(io.StringIO(text), Path("a.jsonl"), broken)], broken.count


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES.replace("\n", "\n\n"),
        "\n\n" + LINES.rstrip(),
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
        json.dumps({"version": 1, "data": RECORDS}, indent=1),
        "\n".join(json.dumps(record, indent=2) for record in RECORDS),
        " ".join(map(json.dumps, RECORDS)),
    ],
    ids=[
        "lines",
        "blank lines",
        "blank start",
        "array",
        "indented array",
        "array by lines",
        "wrapped",
        "objects",
        "row",
    ],
)
def test_every_layout_gives_the_same_records(text):
    assert read(text) == (RECORDS, 0)


def test_an_empty_file_has_no_records():
    assert read("") == read(" \n\n") == read("[]") == ([], 0)


def test_a_single_object_is_a_record():
    assert read('{"messages": [{"role": "user", "content": "Hi"}]}') == (
        [{"messages": [{"role": "user", "content": "Hi"}]}],
        0,
    )
    assert read(json.dumps(RECORDS[0], indent=2)) == (RECORDS[:1], 0)


def test_a_few_broken_lines_are_skipped_and_counted():
    lines = LINES.splitlines()
    lines[2:2] = ["{", '"text"', "[1]"]
    assert read("\n".join(lines)) == (RECORDS, 3)
    assert read("\n".join(["{broken", *lines])) == (RECORDS, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINES.replace("}\n", "},\n"), "line 1: ends in a comma"),
        (LINES + '{"text": "x"},\n', "line 7: ends in a comma"),
        ("[\n" + LINES.replace("}\n", "},\n") + "]", "is a JSON array that cannot be parsed"),
        ("[" + LINES, "is a JSON array that cannot be parsed"),
        ("12", "contains no list of objects"),
        ("[1, 2]", "record 1: not a JSON object"),
        ("text\nand more", "is not valid JSON"),
        ("[" * 100_000, "cannot be parsed"),
        ("{broken\n" * 3 + LINES.splitlines()[0], r"3 of 4 lines are broken; line 1: not a JSON object"),
        ("{broken\n" * 11 + LINES * 4, r"line 11: not a JSON object \(broken lines before it: 10\)"),
    ],
)
def test_what_cannot_be_read_is_one_error_with_its_line(text, message):
    with pytest.raises(DataError, match=message):
        read(text)


def test_a_lone_surrogate_is_skipped_and_counted():
    lines = LINES.splitlines()
    lines[1:1] = ['{"text": "half \\ud83d"}', '{"text": "\\uDC00"}', '{"text": "whole \\ud83d\\ude00"}']
    found, count = read("\n".join(lines))
    assert (len(found), count) == (7, 2)
    assert found[1] == {"text": "whole 😀"}
    found, count = read('[{"text": "half \\ud83d"}, {"text": "x"}]')
    assert (found, count) == ([{"text": "x"}], 1)
    with pytest.raises(DataError, match="line 2: contains a lone surrogate"):
        read("\n".join(lines), limit=0)


def test_an_array_of_mostly_broken_records_is_refused():
    records = [{"text": "\ud800"}] * 10 + [{"text": "sound"}]
    with pytest.raises(DataError, match="10 of 11"):
        read(json.dumps(records), limit=10)


def test_the_text_of_an_array_is_searched_once_and_not_for_each_record(monkeypatch):
    searched = []
    found = json_records._may_have_surrogates
    monkeypatch.setattr(json_records, "_may_have_surrogates", lambda text: searched.append(len(text)) or found(text))
    text = json.dumps(RECORDS, indent=2)
    assert read(text) == (RECORDS, 0)
    assert searched == [len(text)]
