import gzip
import json

import pytest

from mlx_openelm.data.record_files import read_records
from mlx_openelm.data.text_files import BrokenLines
from mlx_openelm.errors import DataError

RECORDS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "Line\nbreak", "completion": "\u2028 “é”, and more"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
CSV = 'prompt,completion\n2 + 2 =, 4\n"Line\nbreak","\u2028 “é”, and more"\n'
FILES = {
    "a.jsonl": LINES,
    "lines.json": LINES,
    "list.json": json.dumps(RECORDS, indent=2),
    "wrapped.json": json.dumps({"version": 2, "data": RECORDS}),
    "a.csv": CSV,
    "marked.csv": "\ufeff" + CSV,
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert list(read_records(tmp_path / name)) == RECORDS
    with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
        file.write(FILES[name])
    assert list(read_records(tmp_path / f"{name}.gz")) == RECORDS


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    halves = [zstandard.compress(line.encode()) for line in LINES.splitlines(keepends=True)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(halves))  # as parallel compressors write it
    assert list(read_records(tmp_path / "a.jsonl.zst")) == RECORDS
    (tmp_path / "b.jsonl.zst").write_bytes(b"no archive at all")
    with pytest.raises(DataError, match=r"b\.jsonl\.zst cannot be read"):
        list(read_records(tmp_path / "b.jsonl.zst"))


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    records = [{"messages": [{"role": "user", "content": "Hi"}]}, {"messages": None}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == records
    (tmp_path / "b.parquet").write_bytes(b"no table at all")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        list(read_records(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "a", "completion": "b", "tags": ["x"]},
        {"chosen": [{"role": "user", "content": "Hi"}], "rejected": [{"role": "user", "content": "Hi"}]},
    ],
)
def test_one_object_may_be_the_only_record(tmp_path, record):
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert list(read_records(tmp_path / "a.json")) == [record]


def test_broken_lines_are_counted_and_passed_over_up_to_a_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{\n[3]\n{"a": 2}\n')
    broken = BrokenLines(path, limit=2)
    assert list(read_records(path, broken)) == [{"a": 1}, {"a": 2}]
    assert broken.count == 2
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: not a JSON object \(broken lines before it: 1\)"):
        list(read_records(path, BrokenLines(path, limit=1)))
    path.write_text("?\n" * 11)
    with pytest.raises(DataError, match="is not valid JSON"):
        list(read_records(path))


def test_rows_that_do_not_have_the_header_s_cells_are_broken(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n3\n4,5,6\n7,8\n")
    broken = BrokenLines(path)
    assert list(read_records(path, broken)) == [{"a": "1", "b": "2"}, {"a": "7", "b": "8"}]
    assert broken.count == 2
    with pytest.raises(DataError, match=r"line 3: expected 2 cells"):
        list(read_records(path, BrokenLines(path, limit=0)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "text", "unsupported file type"),
        ("a.txt.gz", "text", "unsupported file type"),
        ("a.json", "[{]", "is a JSON array that cannot be parsed: .*line 1 column 3"),
        ("a.json", "3", "no list of objects"),
        ("a.json", '[{"a": 1}, 3]', "record 2: not a JSON object"),
        ("a.json", "[" * 100_000, "cannot be parsed"),
        ("a.csv", 'a,b\n1,"2', "line 2: unexpected end of data"),
        ("a.jsonl.gz", "not packed", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason) as error:
        list(read_records(tmp_path / name))
    assert name in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file"):
        list(read_records(tmp_path / "a.jsonl"))


def test_cells_may_have_any_length_and_headers_spaces(tmp_path):
    (tmp_path / "a.csv").write_text(f'prompt, completion\n"{"x" * 200_000}", y\n')
    assert list(read_records(tmp_path / "a.csv")) == [{"prompt": "x" * 200_000, "completion": " y"}]


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    created = pyarrow.array([-(2**62)], pyarrow.timestamp("us"))  # a year that Python has no date for
    table = pyarrow.table({"text": ["a"], "created": created})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet", fields={"text", "prompt"})) == [{"text": "a"}]
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        list(read_records(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="has no column 'prompt'; it has text, created"):
        list(read_records(tmp_path / "a.parquet", fields={"prompt"}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text,text\na,b\n", "several columns are named 'text'"),
        ('a, b\n1, "x"\n', "line 2: a space before a quote"),
        ("a,b\n1\n2\n3,4\n", "2 of 3 lines are broken"),
        ("a,b\n1,\0\n", "line 2: contains a NUL"),
    ],
)
def test_csv_files_that_would_be_read_wrongly_are_refused(tmp_path, content, reason):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=reason):
        list(read_records(tmp_path / "a.csv"))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    for name, content in (("a.csv", "text\nx\n"), ("a.json", '[{"text": "x"}]'), ("a.jsonl", '{"text": "x"}\n' * 2)):
        (tmp_path / name).write_text("\ufeff" + content)
        assert next(read_records(tmp_path / name)) == {"text": "x"}
