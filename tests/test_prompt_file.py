import json
from contextlib import ExitStack

import numpy as np
import pytest

from mlx_openelm import ExampleFormat, Tokenizer
from mlx_openelm.data.dataset import ExampleOptions, read_examples
from mlx_openelm.errors import DataError, OutputError, OutputExistsError
from mlx_openelm.files.output import output_file
from mlx_openelm.generation.prompt_file import AnswerFile, Answers, Prompt, read_prompts
from mlx_openelm.generation.text import Generation, Stats
from mlx_openelm.tokenizer.example_format import instruction_prompt

PROMPTS = [Prompt({"prompt": text, "id": number}, [number]) for number, text in enumerate(["one", "two", "three"])]


def answer(text):
    return Generation("", text, [1, 2], [0.0, 0.0], "length", Stats(4, 2, 0.1, 0.1, 0))


def written(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    return tmp_path / name


class TestReadPrompts:
    def test_text_and_chat(self, tokenizer, chat_tokenizer, tmp_path):
        path = written(tmp_path, "p.jsonl", '{"prompt": "the fox", "id": 7}\n\n{"prompt": "She"}\n')
        first, second = read_prompts(path, tokenizer, chat=False)
        assert first.record == {"prompt": "the fox", "id": 7}
        assert (first.tokens, second.tokens) == (tokenizer.encode("the fox"), tokenizer.encode("She"))
        (first, _) = read_prompts(path, chat_tokenizer, chat=True, system="Be kind.")
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the fox"}]
        assert first.tokens == chat_tokenizer.encode_chat(messages)

    def test_messages(self, chat_tokenizer, tmp_path):
        messages = [{"role": "user", "content": "Hello"}]
        path = written(tmp_path, "p.json", json.dumps([{"messages": messages}]))
        (found,) = read_prompts(path, chat_tokenizer, chat=True)
        assert found.tokens == chat_tokenizer.encode_chat(messages)

    def test_tables(self, tokenizer, tmp_path):
        (found,) = read_prompts(written(tmp_path, "p.csv", "id,prompt\n3,the fox\n"), tokenizer, chat=False)
        assert found.record == {"id": "3", "prompt": "the fox"}

    @pytest.mark.parametrize(
        "record",
        [
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            {"instruction": "Hi", "output": "Hello"},
            {"instruction": "Hi", "input": "there", "output": "Hello"},
            {"prompt": "Hi", "completion": "Hello"},
            {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
            {
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
            },
        ],
    )
    @pytest.mark.parametrize("style", ["", "chat", "instruction"])
    def test_records_to_tune_on_are_asked_as_they_are_tuned_on(self, tokenizer_path, tmp_path, record, style):
        """Up to where the first answer begins; the answers stay in the record."""
        ours = Tokenizer(tokenizer_path, chat_template="openelm")
        path = written(tmp_path, "p.jsonl", json.dumps(record))
        examples = read_examples(path, ours, ExampleOptions(example_format=ExampleFormat(prompt_style=style)))
        example = examples.examples[0].sequences[0]
        ours.example_format = examples.example_format
        (found,) = read_prompts(path, ours)
        assert found.tokens == example.tokens[: int(np.argmax(example.completion_mask))].tolist()
        assert found.record == record

    def test_text_to_continue_gives_its_name_to_the_answer(self, chat_tokenizer, tmp_path):
        path = written(tmp_path, "p.jsonl", '{"text": "the fox", "id": 7}\n')
        (found,) = read_prompts(path, chat_tokenizer, chat=False)
        assert (found.record, found.tokens) == ({"prompt": "the fox", "id": 7}, chat_tokenizer.encode("the fox"))

    def test_an_instruction_without_a_chat_template_is_asked_in_alpaca_s(self, tokenizer, tmp_path):
        (found,) = read_prompts(written(tmp_path, "p.jsonl", '{"instruction": "Run."}\n'), tokenizer)
        assert found.tokens == tokenizer.encode(instruction_prompt("Run."))

    def test_columns_have_other_names(self, tokenizer_path, tmp_path):
        ours = Tokenizer(tokenizer_path)
        path = written(tmp_path, "p.csv", "question,text\nthe fox,gold\n")
        with pytest.raises(DataError, match="the field text is reserved"):
            read_prompts(path, ours, columns={"prompt": "question"})
        path = written(tmp_path, "p.csv", "question,id\nthe fox,3\n")
        (found,) = read_prompts(path, ours, columns={"prompt": "question"})
        assert (found.record, found.tokens) == ({"question": "the fox", "id": "3"}, ours.encode("the fox"))
        with pytest.raises(DataError, match=r"record 1: no column 'topic'; the columns are question, id"):
            read_prompts(path, ours, columns={"prompt": "topic"})

    def test_columns_that_an_adapter_remembers(self, tokenizer_path, tmp_path):
        ours = Tokenizer(tokenizer_path)
        ours.example_format = ExampleFormat("completion", {"prompt": "question", "completion": "answer"}, "", "?")
        path = written(tmp_path, "p.csv", "question,id\nthe fox,3\n")  # without answers
        (found,) = read_prompts(path, ours)
        assert found.tokens == ours.encode("the fox?")
        (found,) = read_prompts(written(tmp_path, "q.jsonl", '{"prompt": "the fox"}\n'), ours)
        assert found.tokens == ours.encode("the fox?")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not a JSON object"),
            ("p.jsonl", '{"prompt": "a"}\n{"topic": "b"}\n', "record 2: expected one of the fields .*; found topic"),
            (
                "p.jsonl",
                '{"prompt": "a", "messages": []}\n',
                "record 1: expected one of the fields prompt, .*; found prompt, messages",
            ),
            ("p.jsonl", '{"prompt": "a", "text": "gold"}\n', "record 1: the field text is reserved"),
            ("p.jsonl", '{"prompt": ""}\n', "record 1: the prompt must be non-empty text"),
            ("p.jsonl", '{"prompt": 5}\n', "record 1: prompt must be text; got int"),
            ("p.jsonl", '{"messages": "hello"}\n', "record 1: messages must be a list"),
            ("p.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "without a chat template"),
            ("p.jsonl", "", "contains no prompts"),
            ("p.txt", "hello", "unsupported file type"),
        ],
    )
    def test_what_is_no_prompt_is_told_with_its_place(self, tokenizer, tmp_path, name, content, message):
        with pytest.raises(DataError, match=message):
            read_prompts(written(tmp_path, name, content), tokenizer, chat=False)


def test_answers_come_in_the_order_of_prompts():
    lines = []
    answers = Answers(PROMPTS, lines.append)
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
    }


class Claimed(AnswerFile):
    """An answer file that claims its output itself, as the command does."""

    def __init__(self, prompts, path, settings, overwrite=False):
        with ExitStack() as claims:
            super().__init__(prompts, claims.enter_context(output_file(path, overwrite=overwrite)), settings)
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
        ("prompts", "settings"),
        [
            (PROMPTS, {"seed": 2}),
            (PROMPTS[:2], {"seed": 1}),
            ([*PROMPTS[:2], Prompt({"prompt": "three", "id": 9}, [2])], {"seed": 1}),
        ],
    )
    def test_it_does_not_mix_runs(self, tmp_path, prompts, settings):
        answers = Claimed(PROMPTS, tmp_path / "a.jsonl", {"seed": 1})
        answers.add(0, answer("a"))
        answers.close()
        with pytest.raises(OutputError, match="other prompts or options"):
            Claimed(prompts, tmp_path / "a.jsonl", settings)

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
