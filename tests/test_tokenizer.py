import json
import random

import pytest

from conftest import GOLDEN
from mlx_openelm import Tokenizer
from mlx_openelm.errors import TokenizerError
from mlx_openelm.tokenizer.files import write_tokenizer

TEXTS = [
    "Once upon a time there was",
    "",
    " ",
    "  two leading spaces",
    "tabs\tand\nnewlines\n\n",
    "naïve café — “quotes” …",
    "日本語とemoji 🎉🚀 𐍈",
    "<s> literal </s> markers <unk>",
    "<|user|>\nHello!</s>\n<|assistant|>",
    "<0x41>",
    "a\u0000b",
    "x" * 2000,
]


@pytest.fixture(scope="session")
def json_tokenizer(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("json")
    write_tokenizer(tokenizer, folder)
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(params=["sentencepiece", "tokenizers"])
def either(request, tokenizer, json_tokenizer):
    return tokenizer if request.param == "sentencepiece" else json_tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(either, text):
    assert either.decode(either.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_both_libraries_give_the_same_ids(tokenizer, json_tokenizer, text):
    assert json_tokenizer.encode(text) == tokenizer.encode(text)


def test_both_libraries_give_the_same_ids_for_random_text(tokenizer, json_tokenizer):
    rng = random.Random(0)
    alphabet = "abcdefghij eeeettt   aoinshr,.\n_<>|é日🎉\t0123/s"
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        assert json_tokenizer.encode(text) == tokenizer.encode(text), repr(text)
        assert json_tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text


def test_both_libraries_have_the_same_vocabulary(tokenizer, json_tokenizer):
    assert json_tokenizer.vocab_hash() == tokenizer.vocab_hash()
    assert (json_tokenizer.bos_token_id, json_tokenizer.eos_token_id) == (1, 2)
    assert json_tokenizer.vocab_size == tokenizer.vocab_size == 400


@pytest.mark.parametrize("text", ["Hello", "", "<s>Hello", "<s> <s>"])
def test_bos_comes_exactly_once(either, text):
    assert either.encode(text).count(either.bos_token_id) == 1
    assert either.encode(text)[0] == either.bos_token_id
    assert either.bos_token_id not in either.encode(text, bos=False)


def test_markers_in_a_text_are_no_control_tokens(either):
    assert not {1, 2} & set(either.encode("a <s> b </s> c", bos=False))


def test_composed_and_decomposed_letters_are_the_same(either):
    assert either.encode("cafe\u0301") == either.encode("caf\u00e9")


def test_control_tokens_and_unknown_ids_leave_no_trace(either):
    ids = either.encode("a fox")
    assert either.decode([*ids, 2, 5000, -1]) == "a fox"


def test_half_a_surrogate_pair_is_refused(either):
    with pytest.raises(TokenizerError, match="surrogate at character 2"):
        either.encode("ab\ud83d")


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_gives_whole_characters_and_the_whole_text(either, text):
    decoder = either.stream_decoder()
    pieces = [decoder.push(token) for token in either.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert ("".join(pieces) + decoder.finish()) in (text, " " + text)  # the space that `encode` put in front


def test_a_stream_that_ends_within_a_character_says_so(either):
    ids = either.encode("🎉")[:-1]
    decoder = either.stream_decoder()
    assert "".join(decoder.push(token) for token in ids).strip() == ""
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize("case", json.loads((GOLDEN / "chat.json").read_text())["cases"])
def test_chat_template_is_that_of_the_recipe(chat_tokenizer, case):
    messages, prompt = case["messages"], case["add_generation_prompt"]
    assert chat_tokenizer.render_chat(messages, add_generation_prompt=prompt) == case["text"]


def test_every_turn_is_closed_by_the_control_token(chat_tokenizer):
    messages = [{"role": "user", "content": "Hi </s> there"}, {"role": "assistant", "content": "Hello."}]
    ids = chat_tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert ids[0] == chat_tokenizer.bos_token_id
    assert ids.count(chat_tokenizer.eos_token_id) == 2
    first = ids[1 : ids.index(2)]
    assert chat_tokenizer.decode(first) == "<|user|>\nHi </s> there"


def test_a_conversation_begins_with_what_it_was_before(chat_tokenizer):
    """Otherwise the keys and values of earlier turns could not be kept."""
    messages = [{"role": "user", "content": "Hi"}]
    before = chat_tokenizer.encode_chat(messages)
    messages += [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]
    assert chat_tokenizer.encode_chat(messages)[: len(before)] == before


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "robot", "content": "x"}, "robot"),
        ({"content": "x"}, "None"),
        ({"role": "user", "content": None}, "user"),
    ],
)
def test_malformed_messages_are_refused(chat_tokenizer, message, named):
    with pytest.raises(TokenizerError, match=named):
        chat_tokenizer.encode_chat([message])


def test_base_models_have_no_chat_template(tokenizer):
    with pytest.raises(TokenizerError, match="base model"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{}", b"<html>"])
def test_damaged_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name):
        Tokenizer(tmp_path / name)


def test_byte_level_vocabularies_decode_too(tmp_path):
    from tokenizers import Tokenizer as Library, decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["once upon a time"], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("once upon a 日本 🎉")) == "once upon a 日本 🎉"


def test_a_prompt_gets_the_chat_template_if_there_is_one(tokenizer, chat_tokenizer):
    user = {"role": "user", "content": "Hi"}
    assert tokenizer.encode_prompt("Hi") == tokenizer.encode("Hi")
    assert chat_tokenizer.encode_prompt("Hi") == chat_tokenizer.encode_chat([user])
    assert chat_tokenizer.encode_prompt("Hi", chat=False) == chat_tokenizer.encode("Hi")
    with_system = chat_tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, user])
    assert chat_tokenizer.encode_prompt("Hi", system="Be brief.") == with_system
    with pytest.raises(TokenizerError, match="without a chat template"):
        tokenizer.encode_prompt("Hi", chat=True)
    with pytest.raises(TokenizerError, match="`system` requires a chat template"):
        tokenizer.encode_prompt("Hi", system="Be brief.")
    with pytest.raises(TokenizerError, match="but `chat=False` turns it off"):
        chat_tokenizer.encode_prompt("Hi", chat=False, system="Be brief.")
