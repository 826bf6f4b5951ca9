import gzip
import json

import pytest

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
