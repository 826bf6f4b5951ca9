"""Files of prompts: which records they may have, and what becomes of them."""

import json

import pytest

from mlx_openelm.errors import DataError
from mlx_openelm.generation.prompt_file import read_prompts


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
        ("name", "content", "message"),
        [
            ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not a JSON object"),
            ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "record 2: expected the field prompt .*; found text"),
            (
                "p.jsonl",
                '{"prompt": "a", "messages": []}\n',
                "record 1: expected the field prompt .*; found prompt, messages",
            ),
            ("p.jsonl", '{"prompt": "a", "text": "gold"}\n', "record 1: the field text is reserved"),
            ("p.jsonl", '{"prompt": ""}\n', "record 1: the prompt must be non-empty text"),
            ("p.jsonl", '{"prompt": 5}\n', "record 1: the prompt must be non-empty text"),
            ("p.jsonl", '{"messages": "hello"}\n', "record 1: messages must be a list"),
            ("p.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "without a chat template"),
            ("p.jsonl", "", "contains no prompts"),
            ("p.txt", "hello", "unsupported file type"),
        ],
    )
    def test_what_is_no_prompt_is_told_with_its_place(self, tokenizer, tmp_path, name, content, message):
        with pytest.raises(DataError, match=message):
            read_prompts(written(tmp_path, name, content), tokenizer, chat=False)
