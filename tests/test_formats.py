import numpy as np
import pytest

from mlx_openelm.data.formats import (
    PreferencePair,
    encode_continuation,
    encode_conversation,
    encode_record,
)
from mlx_openelm.errors import DataError, TokenizerError
from mlx_openelm.tokenizer.example_format import ExampleFormat, format_of, instruction_prompt

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def say(role, content):
    return {"role": role, "content": content}


def answers(example, tokenizer):
    """Runs of answer tokens as text, each of which has to end with EOS."""
    runs = np.split(np.arange(len(example.tokens)), np.flatnonzero(np.diff(example.completion_mask)) + 1)
    runs = [example.tokens[run].tolist() for run in runs if example.completion_mask[run[0]]]
    assert all(run[-1] == tokenizer.eos_token_id for run in runs)
    return [b"".join(map(tokenizer.token_bytes, run)).decode() for run in runs]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"text"}, "text"),
        ({"prompt", "completion", "id"}, "completion"),
        ({"prompt", "prompt_id", "messages"}, "chat"),
        ({"instruction", "input", "output", "answer"}, "instruction"),
        ({"instruction", "output", "text"}, "instruction"),
        ({"prompt", "chosen", "rejected", "messages", "score_chosen"}, "preference"),
    ],
)
def test_the_format_is_told_by_the_fields(fields, name):
    assert format_of(dict.fromkeys(fields, "")) == name


def test_fields_of_no_format_are_listed_with_the_formats_there_are():
    with pytest.raises(DataError, match=r"fields question, reply .* completion: prompt, completion"):
        format_of({"question": "", "reply": ""})


def test_all_of_a_text_is_to_be_learnt(tokenizer):
    example = encode_record(ExampleFormat("text"), {"text": "A small fox"}, tokenizer)
    assert example.tokens.tolist() == [*tokenizer.encode("A small fox"), 2]
    assert example.tokens.dtype == np.int32
    assert example.completion_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


@pytest.mark.parametrize("prompt", ["Once upon", "Once upon ", "", " ", "She said: \n", "日本"])
@pytest.mark.parametrize("completion", [" a time", "a time", "\n\nthere", "  two", "🎉 é", "."])
def test_a_prompt_s_ids_begin_those_of_the_whole(tokenizer, prompt, completion):
    example = encode_record(ExampleFormat("completion"), {"prompt": prompt, "completion": completion}, tokenizer)
    before = tokenizer.encode(prompt)
    assert example.tokens[: len(before)].tolist() == before
    assert example.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.tokens.tolist()) == prompt + completion
    assert example.completion_mask.tolist() == [False] * len(before) + [True] * (len(example.tokens) - len(before))


def test_a_word_behind_a_space_is_the_piece_that_it_is_within_a_text(tokenizer):
    text = "Once upon a time there was a small fox"
    cut = text.index(" there")
    example = encode_record(ExampleFormat("completion"), {"prompt": text[:cut], "completion": text[cut:]}, tokenizer)
    assert example.tokens.tolist() == [*tokenizer.encode(text), 2]


def test_a_vocabulary_without_the_space_in_front_encodes_continuations_as_they_are():
    class Bytes:
        def encode(self, text, bos):
            return list(text.replace("\n\n", "\0").encode())  # two newlines are one piece

        def token_bytes(self, token):
            return b"\n\n" if token == 0 else bytes([token])

    assert encode_continuation("\nab", Bytes()) == list(b"\nab")


def test_a_vocabulary_that_joins_newlines_with_words_is_refused():
    class Joined:
        def encode(self, text, bos):
            return [0, 1] if text == "\n" else [0, 2]

        def token_bytes(self, token):
            return (b" ", b"\n", b"\na")[token]

    with pytest.raises(TokenizerError, match="merges a newline"):
        encode_continuation("a", Joined())


@pytest.mark.parametrize("completion", ["", " \n"])
def test_a_blank_completion_is_no_answer(tokenizer, completion):
    assert not encode_record(
        ExampleFormat("completion"), {"prompt": "Hi", "completion": completion}, tokenizer
    ).completion_mask.any()


def test_an_instruction_in_alpaca_s_words():
    assert instruction_prompt("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert instruction_prompt("Add.", "1, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )


def test_an_instruction_with_the_spaces_of_corenet(tokenizer):
    space = " " * 16
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"  \n\n{space}### Instruction:\n{space}Add.\nNow.\n{space}\n{space}### Response:\n"
    )
    assert instruction_prompt("Add.\nNow.", indent=16) == expected
    assert "the request. \n\n" in instruction_prompt("Add.", "1", indent=16)
    assert f"{space}### Input:\n{space}1\n{space}\n" in instruction_prompt("Add.", "1", indent=16)
    record = {"instruction": "Add.\nNow.", "input": "", "output": "true", "answer": "true"}
    example = encode_record(ExampleFormat("instruction", indent=16), record, tokenizer)
    assert example.tokens.tolist() == [*tokenizer.encode(f"{expected}{space}true"), 2]  # as Apple encodes it
    assert answers(example, tokenizer) == [f"{space}true"]


def test_the_assistant_s_messages_are_answers_each_with_its_end(chat_tokenizer):
    messages = [
        *(say(SYSTEM, "Be brief."), say(USER, "Hi"), say(ASSISTANT, "Hello there.")),
        *(say(USER, "Who?"), say(ASSISTANT, "\nA fox, é 🎉")),
    ]
    example = encode_conversation(messages, chat_tokenizer)
    whole = chat_tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert example.tokens.tolist() == whole[: len(example.tokens)]
    assert answers(example, chat_tokenizer) == ["Hello there.", "\nA fox, é 🎉"]
    assert example.tokens[-1] == chat_tokenizer.eos_token_id
    # What stands before an answer is what the model is given when it has to answer.
    begin = np.flatnonzero(np.diff(example.completion_mask.astype(int)) == 1) + 1
    assert [example.tokens[:n].tolist() for n in begin] == [chat_tokenizer.encode_chat(messages[:n]) for n in (2, 4)]


def test_conversations_may_begin_with_the_assistant_and_end_with_the_user(chat_tokenizer):
    example = encode_conversation([say(ASSISTANT, "Hello."), say(USER, "Bye.")], chat_tokenizer)
    assert answers(example, chat_tokenizer) == ["Hello."]
    assert not encode_conversation([say(USER, "Hi"), say(ASSISTANT, " ")], chat_tokenizer).completion_mask.any()


def test_conversations_need_a_chat_template(tokenizer):
    with pytest.raises(DataError, match="a base model without a chat template; set `chat_template`, use an Instruct"):
        encode_conversation([say(USER, "Hi")], tokenizer)


def test_pairs_of_texts(tokenizer):
    record = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5, or so"}
    pair = encode_record(ExampleFormat("preference"), record, tokenizer)
    assert isinstance(pair, PreferencePair)
    assert [answers(side, tokenizer) for side in pair.sequences] == [[" 4"], [" 5, or so"]]
    assert [tokenizer.decode(side.tokens.tolist()) for side in pair.sequences] == ["2 + 2 = 4", "2 + 2 = 5, or so"]


@pytest.mark.parametrize("prompt_is_a_list", [False, True])
def test_pairs_of_conversations_differ_behind_their_shared_prompt(chat_tokenizer, prompt_is_a_list):
    prompt = [say(USER, "Hi"), say(ASSISTANT, "Hello."), say(USER, "Who?")]
    ends = [[say(ASSISTANT, "A fox.")], [say(ASSISTANT, "You."), say(USER, "Me?"), say(ASSISTANT, "No.")]]
    if prompt_is_a_list:
        record = {"prompt": prompt, "chosen": ends[0], "rejected": ends[1]}
    else:
        record = {"prompt": "Hi", "chosen": prompt + ends[0], "rejected": prompt + ends[1]}
    pair = encode_record(ExampleFormat("preference"), record, chat_tokenizer)
    assert [answers(side, chat_tokenizer) for side in pair.sequences] == [["A fox."], ["You.", "No."]]
    assert pair.chosen.tokens.tolist() == encode_conversation(prompt + ends[0], chat_tokenizer).tokens.tolist()


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("text", {"text": 3}, "text must be text; got int"),
        ("preference", {"chosen": "a", "rejected": "b"}, "prompt is missing"),
        ("preference", {"prompt": "x", "chosen": "a", "rejected": []}, "chosen must be a list of messages"),
        ("preference", {"chosen": [say(USER, "a")], "rejected": [say(USER, "b")]}, "must begin with the same message"),
        ("chat", {"messages": "Hi"}, "messages must be a list of messages"),
        ("chat", {"messages": []}, "messages must be a list of messages"),
        ("chat", {"messages": [{"content": "Hi"}]}, "role None"),
        ("chat", {"messages": [say("robot", "Hi")]}, "role 'robot'"),
        ("chat", {"messages": [say(USER, "Hi"), {"role": ASSISTANT}]}, "must be text .role assistant"),
    ],
)
def test_fields_that_are_not_what_they_have_to_be(chat_tokenizer, name, record, reason):
    with pytest.raises((DataError, TokenizerError), match=reason):
        encode_record(ExampleFormat(name), record, chat_tokenizer)


def test_masks_are_as_long_as_their_tokens_and_end_with_eos(chat_tokenizer):
    messages = [say(USER, "Hi"), say(ASSISTANT, "Hello!"), say(USER, "Bye"), say(ASSISTANT, "See you.")]
    example = encode_conversation(messages, chat_tokenizer)
    assert len(example.tokens) == len(example.completion_mask)
    assert (example.tokens[-1], example.completion_mask[-1]) == (chat_tokenizer.eos_token_id, True)
    example = encode_conversation(messages[:3], chat_tokenizer)
    assert len(example.tokens) == len(example.completion_mask)
    assert not example.completion_mask[-1]


@pytest.mark.parametrize(
    "template",
    [
        "N={{ messages | length }};{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}",
        "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '' }}</s>{% endfor %}",
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, template):
    """What it adds for an answer could not be told from the rest, and a user's text would be learned."""
    from mlx_openelm import Tokenizer

    ours = Tokenizer(tokenizer.path, chat_template=template)
    turns = [say(USER, "Hi"), say(ASSISTANT, "Hello there."), say(USER, "Bye"), say(ASSISTANT, "So long, my fox.")]
    with pytest.raises(DataError, match="writes earlier messages in another way"):
        encode_conversation(turns, ours)
