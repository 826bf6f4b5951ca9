"""Files of prompts: which records they may have, and what becomes of them."""

import json

import numpy as np
import pytest

from mlx_openelm import ExampleFormat, Tokenizer
from mlx_openelm.data.dataset import ExampleOptions, read_examples
from mlx_openelm.errors import DataError
from mlx_openelm.generation.prompt_file import read_prompts
from mlx_openelm.tokenizer.example_format import instruction_prompt


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
