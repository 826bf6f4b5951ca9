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


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A byte-level tokenizer.json with added tokens, as that of GPT-2: no BOS in front."""
    from tokenizers import AddedToken, Tokenizer as Package, decoders, models, pre_tokenizers, trainers

    package = Package(models.BPE())
    package.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    package.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    package.train_from_iterator(["once upon a time", "a fox met a wolf"] * 5, trainer)
    package.add_tokens([AddedToken(name, special=False) for name in ("<tool call>", "naïve→x", "fox")])
    folder = tmp_path_factory.mktemp("byte_level")
    package.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}')
    return folder / "tokenizer.json"


def test_byte_level_vocabularies_decode_too(byte_level):
    tokenizer = Tokenizer(byte_level)
    assert tokenizer.decode(tokenizer.encode("once upon a 日本 🎉")) == "once upon a 日本 🎉"


def test_an_added_token_is_text_and_not_made_of_the_byte_alphabet(tmp_path, byte_level):
    """The last one is a character of that alphabet, which the `tokenizers` package itself decodes to a byte."""
    from tokenizers import AddedToken, Tokenizer as Package

    package = Package.from_file(str(byte_level))
    package.add_tokens([AddedToken("é", special=False)])
    package.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(byte_level.with_name("tokenizer_config.json").read_bytes())
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    text = "a <tool call> b naïve→x fox é"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.stream_decoder()
    assert "".join(decoder.push(token) for token in ids) + decoder.finish() == text


def random_texts(seed, count):
    chance = random.Random(seed)
    pool = [
        *range(32, 127),
        *range(0xA0, 0x250),
        0x301,
        0x308,
        0x4E00,
        0x65E5,
        0x1F600,
        0x200D,
        0x3000,
        *[32] * 60,
        10,
        9,
    ]
    names = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<tool call>", "naïve→x", "<0x41>", "▁", "     ", "<|user|>"]
    for _ in range(count):
        length = chance.randrange(24)
        yield "".join(
            chance.choice(names) if chance.random() < 0.05 else chr(chance.choice(pool)) for _ in range(length)
        )


def assert_others_agree(folder, ours, texts):
    """`tokenizers` and stock mlx-lm (which asks `transformers`) give the same ids, also for names of control tokens."""
    from mlx_lm.tokenizer_utils import load as load_stock
    from tokenizers import Tokenizer as Package

    (folder / "config.json").write_text('{"model_type": "openelm"}')
    package, stock = Package.from_file(str(folder / "tokenizer.json")), load_stock(folder)
    for text in texts:
        marked = ours.encode(text, control_tokens=True)
        assert marked == package.encode(text).ids == stock.encode(text), repr(text)
        plain = ours.encode(text)
        assert plain == stock.encode(text, split_special_tokens=True), repr(text)
        assert ours.decode(plain) == stock.decode(plain, skip_special_tokens=True), repr(text)
    assert set(stock.eos_token_ids) == {ours.eos_token_id}


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_other_programs_give_the_same_ids(tmp_path, tokenizer, byte_level, kind, count):
    written = tokenizer if kind == "sentencepiece" else Tokenizer(byte_level)
    write_tokenizer(written, tmp_path)
    assert_others_agree(tmp_path, written, random_texts(count, count))
    again = Tokenizer(tmp_path / "tokenizer.json")
    assert all(again.encode(text) == written.encode(text) for text in random_texts(count + 1, count))


def test_normalizers_that_blow_a_text_up_are_refused(tmp_path, byte_level):
    values = json.loads(byte_level.read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    values["normalizer"] = {"type": "Sequence", "normalizers": [step] * 10}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match="1,000 times longer"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "<unk>"}},
        {"model": {"type": "Unigram", "vocab": [["x", 0.0], ["</s>", 0.0]], "unk_id": None}},
        {"added_tokens": [{"id": "0", "content": "</s>", "special": True}]},
        {"added_tokens": [{"id": 1, "content": "</s>", "special": 1}]},
        {"added_tokens": {}},
        {"added_tokens": 5},
        {"normalizer": {"type": "Sequence", "normalizers": 5}},
        {"normalizer": {"type": "Sequence", "normalizers": ["x"]}},
        {"normalizer": 5},
        {"decoder": 5},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"model": {"type": "BPE", "vocab": {"b": 0, "</s>": 1}, "merges": [], "end_of_word_suffix": "x" * 1000}},
        {"model": []},
    ],
)
def test_a_file_that_cannot_encode_is_refused(tmp_path, byte_level, change):
    values = {**json.loads(byte_level.read_text()), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json").encode("b")


def test_no_text_is_cut_padded_or_split_by_chance(tmp_path, byte_level):
    """A file keeps the state of the tokenizer that saved it; `transformers` does not use it either."""
    values = json.loads(byte_level.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 50},
        **{
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    }
    values["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_bytes(byte_level.with_name("tokenizer_config.json").read_bytes())
    found, expected = Tokenizer(tmp_path / "tokenizer.json"), Tokenizer(byte_level)
    (tmp_path / "out").mkdir()
    write_tokenizer(found, tmp_path / "out")
    for tokenizer in (found, Tokenizer(tmp_path / "out" / "tokenizer.json")):
        for text in ("once upon a time a fox met a wolf", "a"):
            assert tokenizer.encode(text) == expected.encode(text)


def test_an_added_token_with_the_id_of_another_is_refused(tmp_path, byte_level):
    """The package would give it an id of its own choice."""
    values = json.loads(byte_level.read_text())
    values["added_tokens"][-1]["id"] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match="says that 'fox' has the id"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_pattern_that_backtracks_without_end_is_an_error(tmp_path, byte_level):
    """The package gives up and panics, which Python sees as a BaseException."""
    values = json.loads(byte_level.read_text())
    values["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="cannot encode this text"):
        tokenizer.encode("a" * 5000 + "b")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_names_with_a_lone_surrogate_are_refused(tmp_path, byte_level, tokenizer, name):
    source = byte_level if name.endswith("json") else tokenizer.path
    (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: eos_token contains a lone surrogate"):
        Tokenizer(tmp_path / name)


def test_a_folder_s_name_need_not_be_utf8(tmp_path, tokenizer):
    import os

    folder = os.fsencode(tmp_path) + b"/\xff"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    path = os.path.join(os.fsdecode(folder), "tokenizer.model")
    with open(path, "wb") as file:
        file.write(tokenizer.path.read_bytes())
    assert Tokenizer(path).encode("a fox") == tokenizer.encode("a fox")


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
