"""Records of tasks: where they are found, what is refused, and how downloads are bound to their first content."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from made_up_tasks import made_up, made_up_commonsense
from test_task import written

from mlx_openelm import hub_client
from mlx_openelm.errors import DataError, HubUnreachableError, SourceError
from mlx_openelm.evaluation.prompts import check_records, items, prompt_hash
from mlx_openelm.evaluation.suites import find_tasks
from mlx_openelm.evaluation.task_data import read_task_data


def task_of(name, **changes):
    (task,) = find_tasks([name])
    return task


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def put(folder, records, name="test.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(records).encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(records, indent=4), encoding="utf-8")
    else:
        path.write_text(lines(records), encoding="utf-8")
    return path


class TestFolder:
    @pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "jsonl.gz"])
    @pytest.mark.parametrize("name", ["arc_easy", "truthfulqa_mc2", "race", "mmlu_world_religions", "hellaswag"])
    def test_every_format_gives_the_same_prompts(self, tmp_path, name, ending):
        splits = made_up(name)
        for kind, folder in (("jsonl", "a"), (ending, "b")):
            for split, records in splits.items():
                put(tmp_path / folder / name, records, f"{split}.{kind}")
        task = task_of(name).with_shots(3)
        first, second = (read_task_data(task, tmp_path / folder) for folder in "ab")
        assert prompt_hash(items(task, first, limit=20)) == prompt_hash(items(task, second, limit=20))
        check_records(task, second)

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("piqa", "piqa/test.jsonl"),
            ("piqa", "piqa/validation.jsonl"),
            ("piqa", "piqa/validation-00000-of-00001.parquet"),
            ("mmlu_anatomy", "mmlu_anatomy/test.jsonl"),
            ("mmlu_anatomy", "mmlu/anatomy/test-00000-of-00001.parquet"),
        ],
    )
    def test_where_records_may_be(self, tmp_path, name, place):
        splits = made_up("mmlu_anatomy" if name.startswith("mmlu") else name)
        folder, _, file = place.rpartition("/")
        path = put(tmp_path / folder, splits.get("test", splits.get("validation")), file)
        data = read_task_data(task_of(name), tmp_path)
        assert data.origin.path == path
        assert data.origin.num_records == len(data.test.rows) == 100

    @pytest.mark.parametrize("folder", ["piqa", "commonsense/piqa"])
    def test_a_task_of_commonsense_may_be_in_either_folder(self, tmp_path, folder):
        put(tmp_path / folder, made_up_commonsense("piqa"), "test.json")
        assert len(read_task_data(task_of("commonsense/piqa"), tmp_path).test.rows) == 100

    @pytest.mark.parametrize("split", ["train", "validation", "dev"])
    def test_examples_may_be_in_files_of_several_names(self, tmp_path, split):
        put(tmp_path / "arc_easy", made_up("arc_easy")["test"])
        path = put(tmp_path / "arc_easy", made_up("arc_easy")["train"], f"{split}.jsonl")
        assert read_task_data(task_of("arc_easy"), tmp_path).examples.path == path

    def test_the_records_that_are_asked_are_no_examples_unless_the_task_says_so(self, tmp_path):
        put(tmp_path / "piqa", made_up("piqa")["validation"], "validation.jsonl")
        task = task_of("piqa")
        data = read_task_data(task, tmp_path)
        with pytest.raises(DataError, match=r"no data for the examples of task piqa; expected .*piqa/train\.jsonl"):
            items(task, data, shots=2)
        assert len(list(items(task, data))) == 100
        put(tmp_path / "race", made_up("race")["test"])
        race = read_task_data(task_of("race"), tmp_path)
        assert race.examples is race.test

    def test_two_files_of_a_split_are_refused(self, tmp_path):
        put(tmp_path / "piqa", made_up("piqa")["validation"])
        put(tmp_path / "piqa", made_up("piqa")["validation"], "test.json")
        with pytest.raises(DataError, match="keep one of them"):
            read_task_data(task_of("piqa"), tmp_path)

    def test_a_missing_folder_says_what_is_expected(self, tmp_path):
        with pytest.raises(DataError, match=r"has no data for task piqa; expected .*piqa/test\.jsonl \(or \.json"):
            read_task_data(task_of("piqa"), tmp_path)
        with pytest.raises(DataError, match=r"gone does not exist; expected one with data"):
            read_task_data(task_of("piqa"), tmp_path / "gone")
        path = put(tmp_path / "piqa", made_up("piqa")["validation"])
        with pytest.raises(DataError, match=r"jsonl is not a folder; expected one with data"):
            read_task_data(task_of("piqa"), path)
        with pytest.raises(DataError, match=r"no folder for task piqa; pass the folder that contains piqa"):
            read_task_data(task_of("piqa"), path.parent)


class TestOrigin:
    def test_other_data_are_marked_as_local(self, tmp_path):
        path = put(tmp_path / "arc_easy", made_up("arc_easy")["test"])
        origin = read_task_data(task_of("arc_easy"), tmp_path).origin
        assert not origin.is_published
        assert origin.repository == ""
        assert origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_as_many_records_as_were_published_count_where_no_hash_is_known(self, tmp_path):
        (record, *_) = made_up("winogrande")["validation"]
        put(tmp_path / "winogrande", [record] * 1267, "validation.jsonl")
        assert read_task_data(task_of("winogrande"), tmp_path).origin.is_published

    def test_a_hash_says_nothing_about_a_file_in_another_format(self, tmp_path):
        (record, *_) = made_up("arc_easy")["test"]
        put(tmp_path / "a" / "arc_easy", [record] * 2376, "test.jsonl")
        put(tmp_path / "b" / "arc_easy", [record] * 2376, "test.parquet")
        found = [read_task_data(task_of("arc_easy"), tmp_path / folder).origin.is_published for folder in "ab"]
        assert found == [True, False]

    def test_a_known_hash_counts(self, tmp_path):
        path = put(tmp_path, [{"question": "Q", "answers": ["a", "b"], "right": 1}], "questions.jsonl")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for known, is_published in ((digest.upper(), True), ("0" * 64, False)):
            file = written(tmp_path, data={"files": {"test": "questions.jsonl"}}, sha256={"test": known}, documents=1)
            assert read_task_data(task_of(str(file))).origin.is_published is is_published

    def test_a_users_task_finds_its_files_beside_itself(self, tmp_path, monkeypatch):
        put(tmp_path / "data", [{"question": "Q", "answers": ["a", "b"], "right": "1"}] * 3)
        put(tmp_path / "data", [{"question": "E", "answers": ["a", "b"], "right": "0"}] * 3, "more.jsonl")
        files = {"test": "data/test.jsonl", "train": "data/more.jsonl"}
        path = written(tmp_path, data={"files": files}, shots={"default": 1})
        monkeypatch.chdir("/")
        task = task_of(str(path))
        item = next(items(task, read_task_data(task)))
        assert [tuple(request) for request in item.requests] == [("E a\n\nQ", " a"), ("E a\n\nQ", " b")]
        assert item.gold == (1,)


class TestRecords:
    ARC = made_up("arc_easy")["test"][0]

    @pytest.mark.parametrize(
        ("name", "record", "said"),
        [
            ("arc_easy", {"question": "Q"}, r"choices\.text is missing; its fields are question"),
            ("arc_easy", {**ARC, "choices": None}, r"choices\.text is missing"),
            ("arc_easy", {**ARC, "question": None}, "question is missing"),
            ("arc_easy", {**ARC, "question": 3}, "question must be text; got 3"),
            ("arc_easy", {**ARC, "answerKey": 1}, "answerKey must be text; got 1"),
            ("arc_easy", {**ARC, "choices": {"text": ["a", 1], "label": []}}, r"choices\.text must be a list of texts"),
            ("boolq", {"passage": "P", "question": "Q", "label": "yes"}, "label must be a whole number, or"),
            ("race", {"article": "A", "problems": "[1, 2]"}, "problems must be a list of objects, or a text"),
            ("race", {"article": "A", "problems": "__import__('os')"}, "problems must be a list of objects"),
            ("race", {"article": "A", "problems": []}, "problems must be a list of objects"),
            ("commonsense/piqa", {"instruction": "I", "input": "x", "answer": "a"}, "input must be empty, because"),
            ("piqa", made_up_commonsense("piqa")[0], r"goal is missing; .*records of task commonsense/piqa"),
            ("commonsense/piqa", made_up("piqa")["validation"][0], r"\(these are records of task piqa\)"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_named_with_file_and_record(self, tmp_path, name, record, said):
        good = made_up_commonsense("piqa")[0] if "/" in name else next(iter(made_up(name).values()))[0]
        path = put(tmp_path / name, [good, record], "test.json")
        with pytest.raises(DataError, match=said) as caught:
            read_task_data(task_of(name), tmp_path)
        assert str(caught.value).startswith(f"{path}, record 2: ")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", ["", "[]", '{"a": 1}\nbroken\n{"a": 2}\n'])
    def test_broken_and_empty_files_are_refused(self, tmp_path, content):
        path = put(tmp_path / "arc_easy", [])
        path.write_text(content)
        with pytest.raises(DataError, match=str(path)):
            read_task_data(task_of("arc_easy"), tmp_path)

    @pytest.mark.parametrize(("label", "gold"), [(1, 1), ("1", 1), (" 0 ", 0), (True, 1), (False, 0)])
    def test_labels_in_every_form(self, tmp_path, label, gold):
        put(tmp_path / "boolq", [{"passage": "P", "question": "Q", "label": label}])
        task = task_of("boolq")
        assert next(items(task, read_task_data(task, tmp_path))).gold == (gold,)

    def test_fields_of_objects_are_converted_too(self, tmp_path):
        put(tmp_path, [{"question": "Q", "inner": {"answers": ["a", "b"], "right": "1"}}])
        fields = {"question": "text", "inner.answers": "texts", "inner.right": "label"}
        data = {"files": {"test": "test.jsonl"}}
        task = task_of(str(written(tmp_path, fields=fields, choices="inner.answers", gold="inner.right", data=data)))
        (record,) = read_task_data(task).test.rows
        assert record == {"question": "Q", "inner": {"answers": ["a", "b"], "right": 1}}
        assert next(items(task, read_task_data(task))).gold == (1,)

    def test_a_label_that_is_left_open_is_no_answer(self, tmp_path):
        put(tmp_path / "hellaswag", [{**made_up("hellaswag")["validation"][0], "label": ""}])
        task = task_of("hellaswag")
        with pytest.raises(DataError, match="record 1 has no right answer"):
            check_records(task, read_task_data(task, tmp_path))


class Hub:
    """A stand-in for the hub, with one data set."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.sha, self.files = folder, "a" * 40, {}
        self.asked, self.downloaded = [], []
        hub_client._data_answer.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.cached)

    def info(self, repo_id, revision=None, **options):
        self.asked.append((repo_id, revision))
        siblings = [SimpleNamespace(rfilename=name) for name in self.files]
        return SimpleNamespace(siblings=siblings, sha=revision or self.sha)

    def path(self, name, revision):
        return self.folder / revision[:8] / name

    def download(self, repo_id, name, *, revision, repo_type, **options):
        assert repo_type == "dataset"
        self.downloaded.append(name)
        path = self.path(name, revision)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines(self.files[name]), encoding="utf-8")
        return str(path)

    def cached(self, repo_id, name, *, revision, repo_type):
        path = self.path(name, revision)
        return str(path) if path.exists() else None


class TestDownload:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        return Hub(tmp_path / "cache", monkeypatch)

    @pytest.fixture
    def mine(self, tmp_path):
        def make(files=None, **changes):
            data = {"repository": "me/set", "revision": "b" * 40, "files": files or {"test": "one/test.jsonl"}}
            data.update(changes.pop("data", {}))
            return task_of(str(written(tmp_path, data=data, **changes)))

        return make

    RECORDS = ({"question": "Q", "answers": ["a", "b"], "right": 1},) * 2

    def test_a_file_is_downloaded_once_at_its_commit(self, hub, mine):
        hub.files["one/test.jsonl"] = self.RECORDS
        first = read_task_data(mine()).origin
        assert hub.asked == [("me/set", "b" * 40)]
        assert (first.repository, first.revision, first.is_published) == ("me/set", "b" * 40, True)
        assert read_task_data(mine()).origin == first
        assert hub.downloaded == ["one/test.jsonl"]  # the second time, the cache has it

    @pytest.mark.parametrize("known", [True, False], ids=["in the task's file", "at the first download"])
    def test_another_content_is_an_error(self, hub, mine, known):
        hub.files["one/test.jsonl"] = self.RECORDS
        digest = hashlib.sha256(lines(self.RECORDS).encode()).hexdigest()
        task = mine(sha256={"test": digest}) if known else mine()
        origin = read_task_data(task).origin
        origin.path.write_text(lines(self.RECORDS[:1]), encoding="utf-8")
        with pytest.raises(DataError, match=f"has another sha256 than me/set had: expected {digest}, got .*delete it"):
            read_task_data(task)

    def test_a_repository_without_a_commit_stays_at_that_of_the_first_download(self, hub, mine):
        hub.files["english/test-0.jsonl"] = self.RECORDS
        task = mine({"test": "english/test*"}, data={"revision": ""})
        assert read_task_data(task).origin.revision == "a" * 40
        hub.sha = "c" * 40
        hub_client._data_answer.cache_clear()
        hub.files["english/test-0.jsonl"] = self.RECORDS[:1]
        again = read_task_data(task)
        assert (again.origin.revision, again.origin.is_published) == ("a" * 40, True)
        assert len(again.test.rows) == 2

    @pytest.mark.parametrize(
        ("names", "said"), [((), "no file one/test*"), (("one/test.a", "one/test.b"), "2 files like")]
    )
    def test_a_name_must_lead_to_one_file(self, hub, mine, names, said):
        hub.files.update(dict.fromkeys(names, self.RECORDS))
        with pytest.raises(SourceError) as caught:
            read_task_data(mine({"test": "one/test*"}))
        assert said in str(caught.value)

    def test_without_a_network_the_error_names_the_repository(self, hub, mine, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubUnreachableError, match="me/set is not in the Hugging Face cache"):
            read_task_data(mine())

    def test_a_cache_that_cannot_be_written_is_used(self, hub, mine, monkeypatch):
        hub.files["one/test.jsonl"] = self.RECORDS
        (hub.folder / "openelm-mlx").parent.mkdir(parents=True)
        (hub.folder / "openelm-mlx").write_text("a file where the folder would be")
        assert len(read_task_data(mine()).test.rows) == 2

    def test_examples_are_downloaded_when_they_are_needed(self, hub, mine):
        hub.files.update({"one/test.jsonl": self.RECORDS, "one/train.jsonl": self.RECORDS})
        task = mine({"test": "one/test.jsonl", "train": "one/train.jsonl"})
        data = read_task_data(task)
        assert hub.downloaded == ["one/test.jsonl"]
        list(items(task, data, shots=1))
        assert hub.downloaded == ["one/test.jsonl", "one/train.jsonl"]
        assert len(hub.asked) == 1

    def test_what_is_not_on_the_hub_says_where_it_is(self):
        with pytest.raises(
            DataError, match=r"task commonsense/piqa cannot be downloaded; clone https://.*LLM-Adapters"
        ):
            read_task_data(task_of("commonsense/piqa"))


def test_examples_that_are_not_published_are_missed_when_they_are_needed(tmp_path):
    put(tmp_path, [{"question": "Q", "answers": ["a", "b"], "right": 0}])
    task = task_of(str(written(tmp_path, data={"files": {"test": "test.jsonl"}})))
    data = read_task_data(task)
    with pytest.raises(DataError, match="the examples of task mine cannot be downloaded; pass the folder of its data"):
        items(task, data, shots=1)
