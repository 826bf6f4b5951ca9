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

    def test_undo_takes_back_the_last_message_and_its_answer(self, tiny_model, chat_tokenizer):
        chat = Chat(tiny_model, chat_tokenizer, system="Be brief.", max_tokens=4)
        assert chat.undo() is None
        self.answer(chat, "Hello")
        before, second = list(chat.messages), self.answer(chat, "Why?")
        assert chat.undo() == "Why?"
        assert chat.messages == before
        assert self.answer(chat, "Why?") == second
        assert [chat.undo(), chat.undo(), chat.undo()] == ["Why?", "Hello", None]
        assert chat.messages == [{"role": "system", "content": "Be brief."}]

    def test_another_system_message_takes_the_place_of_the_first(self, tiny_model, chat_tokenizer):
        chat = Chat(tiny_model, chat_tokenizer, max_tokens=4)
        self.answer(chat, "Hello")
        turns = list(chat.messages)
        for text in ("Be brief.", "Be long."):
            chat.system = text
            assert (chat.system, chat.messages) == (text, [{"role": "system", "content": text}, *turns])
        whole = chat_tokenizer.encode_chat([*chat.messages, {"role": "user", "content": "Why?"}])
        assert self.answer(chat, "Why?") == generate(tiny_model, chat_tokenizer, whole, max_tokens=4)
        chat.system = None
        assert (chat.system, chat.messages[: len(turns)]) == (None, turns)

    def test_progress_of_a_long_message_is_reported(self, tiny_model, chat_tokenizer):
        chat, seen = Chat(tiny_model, chat_tokenizer, max_tokens=1), []
        (chunk,) = chat.reply("Hello", on_prefill=lambda done, total: seen.append((done, total)))
        assert seen == [(0, chunk.stats.prompt_tokens), (chunk.stats.prompt_tokens,) * 2]

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

    @pytest.mark.parametrize("seed", [3, (1 << 63) - 1])
    def test_each_answer_has_a_seed_of_its_own(self, tiny_model, chat_tokenizer, seed):
        chat = Chat(tiny_model, chat_tokenizer, sampling=SamplingConfig(temperature=1.0, seed=seed), max_tokens=2)
        used = []
        for _ in range(3):
            (*_, last) = chat.reply("Hi")
            used.append(last.stats.seed)
            chat.undo()
        assert used == [(seed + number) % (1 << 63) for number in range(3)]

    def test_a_seed_that_was_drawn_is_told_and_repeats_the_answers(self, tiny_model, chat_tokenizer):
        first = Chat(tiny_model, chat_tokenizer, sampling=SamplingConfig(temperature=1.0), max_tokens=8)
        again = Chat(tiny_model, chat_tokenizer, sampling=first.sampling, max_tokens=8)
        for text in ("Hi", "And?"):
            assert self.answer(first, text) == self.answer(again, text)
        assert Chat(tiny_model, chat_tokenizer).sampling.seed is None


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
        chat = Chat(tiny_model, instructed)
        with pytest.raises(TokenizerError, match="requires a chat template"):
            chat.system = "Be brief."
        chat.system = None

    def test_a_model_that_only_continues_text_does_not_chat(self, tiny_model, instructed, tokenizer_path):
        instructed.example_format = ExampleFormat("text")
        with pytest.raises(TokenizerError, match="generate to continue text"):
            Chat(tiny_model, instructed)
        with_template = Tokenizer(tokenizer_path, chat_template="openelm")
        with_template.example_format = ExampleFormat("text")
        assert not Chat(tiny_model, with_template).answers_alone
