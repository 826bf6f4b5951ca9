"""Conversations: turns share a cache, and what fails changes nothing."""

import pytest

from mlx_openelm import Chat, ExampleFormat, SamplingConfig, Tokenizer, generate
from mlx_openelm.errors import TokenizerError

PROMPT = "Once upon a time"


class TestChat:
    def answer(self, chat, text):
        return "".join(chunk.text for chunk in chat.reply(text))

    def test_turns_give_what_the_whole_conversation_gives(self, tiny_model, chat_tokenizer):
        chat = Chat(tiny_model, chat_tokenizer, system="Be brief.", max_tokens=6)
        for text in ("Hello", "And then?", "Why?"):
            messages = [*chat.messages, {"role": "user", "content": text}]
            whole = generate(tiny_model, chat_tokenizer, chat_tokenizer.encode_chat(messages), max_tokens=6)
            assert self.answer(chat, text) == whole
        assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]

    def test_later_turns_compute_only_what_is_new(self, tiny_model, chat_tokenizer):
        chat = Chat(tiny_model, chat_tokenizer, max_tokens=4)
        (*_, first) = chat.reply("Hello, this is a long message about a fox in a garden")
        (*_, second) = chat.reply("Hm")
        assert (
            second.stats.prompt_tokens
            > first.stats.prompt_tokens
            == first.stats.prompt_tokens - first.stats.reused_tokens
        )
        assert second.stats.prompt_tokens - second.stats.reused_tokens < first.stats.prompt_tokens

    def test_an_answer_that_is_cut_belongs_to_the_conversation(self, tiny_model, chat_tokenizer):
        chat = Chat(tiny_model, chat_tokenizer, max_tokens=20)
        reply = chat.reply("Hello")
        chunks = [next(reply) for _ in range(5)]
        reply.close()
        assert chat.messages[-1]["content"] == "".join(chunk.text for chunk in chunks).lstrip()
        whole = chat_tokenizer.encode_chat([*chat.messages, {"role": "user", "content": "Tell me more"}])
        expected = generate(tiny_model, chat_tokenizer, whole, max_tokens=20)
        assert self.answer(chat, "Tell me more") == expected

    def test_reset_forgets_all_but_the_system_message(self, tiny_model, chat_tokenizer):
        chat = Chat(tiny_model, chat_tokenizer, system="Be brief.", max_tokens=4)
        first = self.answer(chat, "Hello")
        chat.reset()
        assert chat.messages == [{"role": "system", "content": "Be brief."}]
        assert self.answer(chat, "Hello") == first

    def test_a_message_that_fails_changes_nothing(self, tiny_model, chat_tokenizer):
        chat = Chat(tiny_model, chat_tokenizer, max_tokens=4)
        self.answer(chat, "Hello")
        before = list(chat.messages)
        with pytest.raises(TokenizerError):
            self.answer(chat, "\ud83d")
        assert chat.messages == before
        self.answer(chat, "Still there?")

    def test_base_models_do_not_chat(self, tiny_model, tokenizer):
        with pytest.raises(TokenizerError, match="base model"):
            Chat(tiny_model, tokenizer)

    def test_sampling_with_a_seed_reproduces(self, tiny_model, chat_tokenizer):
        sampling = SamplingConfig(temperature=1.0, seed=3)
        answers = [self.answer(Chat(tiny_model, chat_tokenizer, sampling=sampling, max_tokens=8), "Hi") for _ in "ab"]
        assert answers[0] == answers[1]


class TestOtherFormats:
    @pytest.fixture
    def instructed(self, tokenizer_path):
        """The tokenizer of a base model that was tuned on instructions."""
        tokenizer = Tokenizer(tokenizer_path)
        tokenizer.example_format = ExampleFormat("instruction")
        return tokenizer

    def test_each_message_is_asked_alone_in_the_format_of_the_examples(self, tiny_model, instructed):
        chat = Chat(tiny_model, instructed, max_tokens=5)
        assert chat.answers_alone
        for text in ("Hello", "And then?"):
            alone = generate(tiny_model, instructed, instructed.encode_prompt(text), max_tokens=5)
            assert "".join(chunk.text for chunk in chat.reply(text)) == alone
        assert [message["content"] for message in chat.messages[::2]] == ["Hello", "And then?"]

    def test_there_is_no_system_message(self, tiny_model, instructed):
        with pytest.raises(TokenizerError, match="requires a chat template, but the model was tuned on single"):
            Chat(tiny_model, instructed, system="Be brief.")

    def test_a_model_that_only_continues_text_does_not_chat(self, tiny_model, instructed, tokenizer_path):
        instructed.example_format = ExampleFormat("text")
        with pytest.raises(TokenizerError, match="generate to continue text"):
            Chat(tiny_model, instructed)
        with_template = Tokenizer(tokenizer_path, chat_template="openelm")
        with_template.example_format = ExampleFormat("text")
        assert not Chat(tiny_model, with_template).answers_alone
