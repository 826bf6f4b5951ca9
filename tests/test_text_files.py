import gzip
import json

import pytest

from mlx_openelm.data import json_records, limits
from mlx_openelm.data.record_files import read_records
from mlx_openelm.data.text_files import TextSource, read_documents
from mlx_openelm.errors import DataError


def lines(*texts):
    return "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts)


def test_text_files_are_split_where_documents_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert list(read_documents(path)) == ["One.\n\nStill one.", "Two.", ""]
    path.write_text("Only one\n")
    assert list(read_documents(path)) == ["Only one"]


def test_json_lines_plain_and_compressed(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("x", "y\nz"))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines("x", "y\nz"))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert list(read_documents(tmp_path / name)) == ["x", "y\nz"]


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines("x", "y").encode()))
    assert list(read_documents(tmp_path / "a.jsonl.zst")) == ["x", "y"]


@pytest.mark.parametrize("frames", [1, 3])
def test_an_incomplete_zstandard_file_is_refused(tmp_path, frames):
    """The package's own reader takes it for a shorter text."""
    zstandard = pytest.importorskip("zstandard")
    texts = [f"line {number} of a text that is not short" for number in range(300)]
    whole = b"".join(zstandard.compress(lines(*texts).encode()) for _ in range(frames))
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(whole)
    assert list(read_documents(path)) == texts * frames
    for cut in (1, 3, 5, len(whole) // 2 + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="within a compressed frame"):
            list(read_documents(path))
    path.write_bytes(whole + b"more")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_documents(path))


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"story": ["x", None, "y"]}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet", "story")) == ["x", "y"]
    with pytest.raises(DataError, match="no column 'text'; it has story"):
        list(read_documents(tmp_path / "a.parquet"))


def test_broken_lines_are_passed_over_up_to_a_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines("x") + "{\n" + '{"text": 3}\n' + "\n" + lines("y") + lines("z") + "nonsense\n")
    assert list(read_documents(path, max_broken=3)) == ["x", "y", "z"]
    with pytest.raises(DataError, match=r"line 7: not a JSON object.* \(broken lines before it: 2\)"):
        list(read_documents(path, max_broken=2))


def test_a_file_of_which_most_lines_are_broken_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines("x") + '{"content": "a"}\n{"content": "b"}\n')
    with pytest.raises(DataError, match=r"2 of 3 lines are broken; line 2: not a JSON object with text under 'text'"):
        list(read_documents(path))
    path.write_text('[\n{"text": "x"},\n{"text": "y"}\n]\n')
    assert list(read_documents(path)) == ["x", "y"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"ab\xff"])
def test_files_that_are_no_text_are_named(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        list(read_documents(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        list(read_documents(tmp_path / "a.jsonl.gz"))


def test_files_of_globs_and_numbered_patterns(tmp_path):
    for number in range(4):
        (tmp_path / f"part-{number:05d}.txt").write_text("x")
    assert [path.name for path in TextSource(f"{tmp_path}/*.txt").files()] == [f"part-{n:05d}.txt" for n in range(4)]
    pattern = TextSource(f"{tmp_path}/part-{{file_id:05d}}.txt", first=1, last=2)
    assert [path.name for path in pattern.files()] == ["part-00001.txt", "part-00002.txt"]
    with pytest.raises(DataError, match=r"part-00004\.txt does not exist"):
        TextSource(f"{tmp_path}/part-{{file_id:05d}}.txt", first=1, last=4).files()
    with pytest.raises(DataError, match="must be positive; got 0"):
        TextSource(f"{tmp_path}/*.txt", weight=0).files()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.jsonl.zst", "a.csv.zst"])
@pytest.mark.parametrize("content", ["x", "text\n", '{"a": 1}\n'])
def test_a_small_file_does_not_unpack_without_end(tmp_path, name, content, monkeypatch):
    monkeypatch.setattr(limits, "_ANY_UNPACKED_BYTES", 1 << 20)
    text = (content * (3 << 20))[: 3 << 20].encode()
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(text))
    else:
        zstandard = pytest.importorskip("zstandard")
        (tmp_path / name).write_bytes(zstandard.compress(text))
    with pytest.raises(DataError, match=r"unpacks to more than 100 times its size|lines are broken|line 1: not a JSON"):
        for _ in read_records(tmp_path / name):
            pass


def test_rows_of_a_small_parquet_file_have_the_same_limit(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    monkeypatch.setattr(limits, "_ANY_UNPACKED_BYTES", 1 << 20)
    parquet.write_table(pyarrow.table({"text": ["x" * 10_000] * 500}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="unpacks to more than 100 times"):
        list(read_documents(tmp_path / "a.parquet"))
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'text' must be text; got 1"):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_line_may_be_long_but_not_without_end(tmp_path, monkeypatch):
    for module in (limits, json_records):
        monkeypatch.setattr(module, "LONGEST_TEXT", 1000)
    for name, content in (("a.txt", "x" * 1001), ("a.jsonl", '{"text": "' + "x" * 1001), ("a.csv", "a\n" + "x" * 1001)):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"line \d: longer than 1,000 characters"):
            list(read_records(tmp_path / name) if name != "a.txt" else read_documents(tmp_path / name))
    (tmp_path / "a.json").write_text("[" + '{"a": 1},\n' * 200 + "{}]")
    with pytest.raises(DataError, match="longer than 1,000 characters; write it with one object per line"):
        list(read_records(tmp_path / "a.json"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_text_in_another_encoding_is_named(tmp_path, encoding):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes('{"text": "some text"}\n'.encode(encoding))
        with pytest.raises(DataError, match=r"not text in UTF-8|line 1: contains a NUL character"):
            list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    "pattern", ["a{file_id}{x}", "a{file_id:099999999d}", "a{file_id!r}{file_id.x}", "{0}{file_id}"]
)
def test_only_the_number_of_a_pattern_is_filled_in(tmp_path, pattern):
    with pytest.raises(DataError, match="does not exist"):
        TextSource(str(tmp_path / pattern), last=2).files()


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.csv.gz", "a.arrow"])
def test_tables_are_no_texts(tmp_path, name):
    (tmp_path / name).write_text("text\nfox\n")
    with pytest.raises(DataError, match="cannot be read as texts"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json"])
def test_json_is_known_by_its_ending(tmp_path, name):
    (tmp_path / name).write_text(lines("x", "y"))
    assert list(read_documents(tmp_path / name)) == ["x", "y"]


def test_a_file_whose_name_has_brackets(tmp_path):
    for name in ("c[1].txt", "c1.txt"):
        (tmp_path / name).write_text(name)
    assert TextSource(str(tmp_path / "c[1].txt")).files() == [tmp_path / "c[1].txt"]
