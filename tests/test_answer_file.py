"""Files of answers: complete or continued, never mixed, and recognised once they are finished."""

import json
import re
from contextlib import ExitStack

import pytest

from mlx_openelm.errors import OutputError, OutputExistsError
from mlx_openelm.files.output import output_file
from mlx_openelm.generation.answer_file import AnswerFile, AnswerRun, Answers, is_answer_file, is_finished
from mlx_openelm.generation.prompt_file import Prompt
from mlx_openelm.generation.text import Generation, Stats

PROMPTS = [Prompt({"prompt": text, "id": number}, [number]) for number, text in enumerate(["one", "two", "three"])]


def answer(text):
    return Generation("", text, [1, 2], [0.0, 0.0], "length", Stats(4, 2, 0.1, 0.1, 0))


def test_answers_come_in_the_order_of_prompts():
    lines = []
    answers = Answers(AnswerRun(PROMPTS, {}), lines.append)
    answers.add(1, answer("b"))
    assert lines == []
    answers.add(0, answer("a"))
    assert [json.loads(line)["text"] for line in lines] == ["a", "b"]
    assert answers.missing == [2]
    answers.add(2, answer("c\u2028d"))
    answers.finish()
    assert json.loads(lines[2]) == {
        "prompt": "three",
        "id": 2,
        "text": "c\u2028d",
        "finish_reason": "length",
        "prompt_tokens": 4,
        "generated_tokens": 2,
        "run": AnswerRun(PROMPTS, {}).mark,
    }


class Claimed(AnswerFile):
    """An answer file that claims its output itself, as the command does."""

    def __init__(self, prompts, path, settings, overwrite=False, drawn_seed=None):
        with ExitStack() as claims:
            output = claims.enter_context(output_file(path, overwrite=overwrite))
            super().__init__(AnswerRun(prompts, settings, drawn_seed), output)
            self._claims = claims.pop_all()

    def finish(self):
        super().finish()
        self._claims.close()

    def close(self):
        super().close()
        self._claims.close()


class TestAnswerFile:
    def test_it_is_there_when_it_is_whole(self, tmp_path):
        path = tmp_path / "new" / "a.jsonl"
        answers = Claimed(PROMPTS, path, {})
        for number in (2, 0, 1):
            assert not path.exists()
            answers.add(number, answer(f"answer {number}"))
        answers.finish()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["text"] for line in lines] == ["answer 0", "answer 1", "answer 2"]
        assert list(path.parent.iterdir()) == [path]

    def test_it_goes_on_after_an_interruption_even_within_a_line(self, tmp_path):
        path = tmp_path / "a.jsonl"
        answers = Claimed(PROMPTS, path, {"seed": 1})
        answers.add(2, answer("c\u2028ü"))
        answers.add(0, answer("a"))
        answers.close()
        part = tmp_path / "a.jsonl.part"
        part.write_bytes(part.read_bytes()[:-5])
        answers = Claimed(PROMPTS, path, {"seed": 1})
        assert answers.missing == [0, 1]
        answers.add(1, answer("b"))
        answers.close()
        answers = Claimed(PROMPTS, path, {"seed": 1})
        assert answers.missing == [0]
        answers.add(0, answer("a"))
        answers.finish()
        with open(path, encoding="utf-8", newline="\n") as file:
            assert [json.loads(line)["text"] for line in file] == ["a", "b", "c\u2028ü"]

    @pytest.mark.parametrize(
        ("prompts", "settings", "changes"),
        [
            (PROMPTS, {"seed": 2, "model": "a", "stop": []}, "these changed: `seed` 1 -> 2;"),
            (PROMPTS, {"seed": None, "model": "a", "stop": []}, "these changed: `seed` 1 -> none;"),
            (PROMPTS, {"seed": 1, "model": "b", "stop": ["x"]}, "these changed: the model, `stop` [] -> ['x'];"),
            (PROMPTS[:2], {"seed": 1, "model": "a", "stop": []}, "these changed: the prompts;"),
            (
                [*PROMPTS[:2], Prompt({"prompt": "three", "id": 9}, [2])],
                {"seed": 1, "model": "b", "stop": []},
                "these changed: the prompts, the model;",
            ),
        ],
    )
    def test_it_does_not_mix_runs_and_says_what_differs(self, tmp_path, prompts, settings, changes):
        answers = Claimed(PROMPTS, tmp_path / "a.jsonl", {"seed": 1, "model": "a", "stop": []})
        answers.add(0, answer("a"))
        answers.close()
        with pytest.raises(OutputError, match=re.escape(changes)):
            Claimed(prompts, tmp_path / "a.jsonl", settings)

    def test_a_seed_that_was_drawn_is_that_of_all_answers(self, tmp_path):
        path = tmp_path / "a.jsonl"
        answers = Claimed(PROMPTS, path, {"seed": None}, drawn_seed=5)
        assert answers.drawn_seed == 5
        answers.close()
        answers = Claimed(PROMPTS, path, {"seed": None}, drawn_seed=6)
        assert answers.drawn_seed == 6  # nothing was sampled with the other one
        answers.add(0, answer("a"))
        answers.close()
        answers = Claimed(PROMPTS, path, {"seed": None}, drawn_seed=7)
        assert (answers.drawn_seed, answers.missing) == (6, [1, 2])
        answers.close()
        part = tmp_path / "a.jsonl.part"
        part.write_bytes(b"{" + part.read_bytes())
        answers = Claimed(PROMPTS, path, {"seed": None}, drawn_seed=8)
        assert (answers.drawn_seed, answers.missing) == (8, [0, 1, 2])
        answers.close()

    def test_a_beginning_that_was_cut_is_begun_again(self, tmp_path):
        (tmp_path / "a.jsonl.part").write_text('{"run"')
        answers = Claimed(PROMPTS, tmp_path / "a.jsonl", {})
        assert answers.missing == [0, 1, 2]
        answers.add(0, answer("a"))
        answers.close()
        again = Claimed(PROMPTS, tmp_path / "a.jsonl", {})
        again.close()
        assert again.missing == [1, 2]

    def test_a_run_without_an_answer_is_begun_again_whatever_it_was(self, tmp_path):
        Claimed(PROMPTS, tmp_path / "a.jsonl", {"seed": 1}).close()
        Claimed(PROMPTS, tmp_path / "a.jsonl", {"seed": 2}).close()

    @pytest.mark.parametrize("content", [b'{"run": 1}\n\xff\t{}\n', b'{"run": 1}\nhello\n', b"precious", b"\n"])
    def test_a_file_that_is_something_else_stays(self, tmp_path, content):
        (tmp_path / "a.jsonl.part").write_bytes(content)
        with pytest.raises(OutputError, match="is not an answer file"):
            Claimed(PROMPTS, tmp_path / "a.jsonl", {})
        assert (tmp_path / "a.jsonl.part").read_bytes() == content

    @pytest.mark.parametrize(
        "line",
        [
            "0\tnot json",
            '1\t{"prompt": "another"}',
            "1\t\t",
            "7\t0\t{}",
            "x",
            '0\t{sum}\t{"prompt": "x", "text": "made up"}',
        ],
    )
    def test_what_has_no_checksum_of_its_own_is_computed_again(self, tmp_path, line):
        answers = Claimed(PROMPTS, tmp_path / "a.jsonl", {"seed": 1})
        answers.add(2, answer("c"))
        answers.close()
        part = tmp_path / "a.jsonl.part"
        heading, genuine = part.read_text().splitlines()
        part.write_text(
            f"{heading}\n{line.replace('{sum}', genuine.split()[1])}\n{genuine}\n{genuine.replace('c', 'd')}\n"
        )
        answers = Claimed(PROMPTS, tmp_path / "a.jsonl", {"seed": 1})
        assert answers.missing == [0, 1]
        for number in answers.missing:
            answers.add(number, answer("a"))
        answers.finish()
        lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [found["text"] for found in lines] == ["a", "a", "c"]

    def test_what_a_link_in_its_place_leads_to_stays(self, tmp_path):
        (tmp_path / "victim").write_text("precious")
        (tmp_path / "a.jsonl.part").symlink_to("victim")
        with pytest.raises(OutputError, match="is not an answer file"):
            Claimed(PROMPTS, tmp_path / "a.jsonl", {})
        assert (tmp_path / "victim").read_text() == "precious"

    def test_the_answers_are_written_where_a_link_leads(self, tmp_path):
        (tmp_path / "old").write_text("old")
        (tmp_path / "link").symlink_to("old")
        with pytest.raises(OutputExistsError):
            Claimed(PROMPTS[:1], tmp_path / "link", {})
        answers = Claimed(PROMPTS[:1], tmp_path / "link", {}, overwrite=True)
        answers.add(0, answer("a"))
        answers.finish()
        assert json.loads((tmp_path / "old").read_text())["text"] == "a"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]

    def test_half_a_character_is_kept(self, tmp_path):
        record = json.loads('{"prompt": "x", "note": "\\ud800"}')
        answers = Claimed([Prompt(record, [1])], tmp_path / "a.jsonl", {})
        answers.add(0, answer("a"))
        answers.finish()
        assert json.loads((tmp_path / "a.jsonl").read_text())["note"] == record["note"]

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            Claimed(PROMPTS, tmp_path / "file" / "a.jsonl", {})


class TestFinished:
    RUN = AnswerRun(PROMPTS, {"max_tokens": 4})

    def answered(self, path, prompts=PROMPTS, settings=RUN.settings):
        answers = Claimed(prompts, path, settings)
        for number in answers.missing:
            answers.add(number, answer("a"))
        answers.finish()
        return path

    def test_its_answers_tell_it_from_other_runs(self, tmp_path):
        path = self.answered(tmp_path / "a.jsonl")
        assert is_answer_file(path)
        assert is_finished(path, self.RUN)
        assert not is_finished(path, AnswerRun(PROMPTS, {"max_tokens": 5}))
        assert not is_finished(path, AnswerRun(PROMPTS[:2], {"max_tokens": 4}))
        assert is_finished(path, AnswerRun(PROMPTS, {"max_tokens": 4}, drawn_seed=3))

    def test_an_answer_that_was_removed_or_added_is_noticed(self, tmp_path):
        path = self.answered(tmp_path / "a.jsonl")
        lines = path.read_text().splitlines(keepends=True)
        for changed in (lines[1:], [*lines, lines[0]], [*lines, '{"prompt": "four"}\n'], ["\n"], []):
            path.write_text("".join(changed))
            assert not is_finished(path, self.RUN)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"precious\n", b'{"run": "0123456789abcdef"}\n'])
    def test_other_files_are_none(self, tmp_path, content):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert not is_answer_file(tmp_path / "a.jsonl")
        assert not is_finished(tmp_path / "a.jsonl", self.RUN)
        assert not is_answer_file(tmp_path)

    def test_prompts_keep_a_field_of_that_name(self, tmp_path):
        prompts = [Prompt({"prompt": "one", "run": "0123456789ab"}, [1])]
        path = self.answered(tmp_path / "a.jsonl", prompts)
        assert json.loads(path.read_text())["run"] == "0123456789ab"
        assert not is_answer_file(path)
