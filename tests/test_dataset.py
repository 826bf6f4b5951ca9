import json

import numpy as np
import pytest

from mlx_openelm.data.dataset import ExampleOptions, marked, read_examples, read_splits
from mlx_openelm.data.formats import Example
from mlx_openelm.errors import DataError
from mlx_openelm.tokenizer.example_format import ExampleFormat


def write(path, records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


def completions(count, begin=0):
    return [{"prompt": f"Number {n}:", "completion": f" {n}"} for n in range(begin, begin + count)]


def texts(examples, tokenizer):
    return [tokenizer.decode(example.tokens.tolist()) for example in examples.examples]


def test_examples_are_those_of_the_file_in_its_order(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [*completions(2), "broken\n", *completions(1, 2)])
    examples = read_examples(path, tokenizer)
    assert texts(examples, tokenizer) == ["Number 0: 0", "Number 1: 1", "Number 2: 2"]
    assert (examples.format, examples.path, examples.num_broken) == ("completion", path, 1)
    assert (examples.num_cut, examples.num_dropped) == (0, 0)


def test_long_examples_are_cut_or_dropped(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " b" * 30}])
    before = len(tokenizer.encode("a"))
    cut = read_examples(path, tokenizer, ExampleOptions(max_length=10))
    assert [len(example.tokens) for example in cut.examples] == [before + 2, 10]
    assert cut.examples[1].completion_mask.tolist() == [False] * before + [True] * (10 - before)
    assert cut.examples[1].tokens[-1] != tokenizer.eos_token_id  # the text goes on there
    assert (cut.num_cut, cut.num_dropped) == (1, 0)
    dropped = read_examples(path, tokenizer, ExampleOptions(max_length=10, too_long="drop"))
    assert (len(dropped.examples), dropped.num_cut, dropped.num_dropped) == (1, 0, 1)


def test_examples_without_an_answer_are_dropped(tmp_path, tokenizer):
    records = [{"prompt": "a", "completion": " b"}, {"prompt": "a " * 30, "completion": " b"}]
    path = write(tmp_path / "a.jsonl", [*records, {"prompt": "a", "completion": ""}])
    examples = read_examples(path, tokenizer, ExampleOptions(max_length=10))
    assert (len(examples.examples), examples.num_cut, examples.num_dropped) == (1, 0, 2)
    with pytest.raises(DataError, match=r"example to train on: 1 have no answer within 10 tokens; the longest has"):
        read_examples(write(tmp_path / "a.jsonl", records[1:]), tokenizer, ExampleOptions(max_length=10))
    with pytest.raises(DataError, match=r"a\.jsonl contains no example to train on$"):
        read_examples(write(tmp_path / "a.jsonl", []), tokenizer)


def test_all_tokens_behind_bos_can_be_trained_on(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", completions(1))
    (example,) = read_examples(path, tokenizer, ExampleOptions(train_on="all")).examples
    assert example.completion_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_pairs_of_equal_answers_are_dropped(tmp_path, tokenizer):
    records = [{"prompt": "a", "chosen": " b", "rejected": end} for end in (" b", " c", "")]
    examples = read_examples(write(tmp_path / "a.jsonl", records), tokenizer, ExampleOptions(train_on="all"))
    assert (examples.format, len(examples.examples), examples.num_dropped) == ("preference", 1, 2)
    before = len(tokenizer.encode("a"))
    for side in examples.examples[0].sequences:  # the prompt says nothing about which is better
        assert side.completion_mask.tolist() == [False] * before + [True] * (len(side.tokens) - before)


def test_fields_may_go_by_other_names(tmp_path, tokenizer):
    record = {"question": "2 + 2 =", "answer": " 4", "text": "unrelated", "instruction": "x", "output": "y"}
    path = write(tmp_path / "a.jsonl", [record])
    named = ExampleOptions(example_format=ExampleFormat(columns={"prompt": "question", "completion": "answer"}))
    assert texts(read_examples(path, tokenizer, named), tokenizer) == ["2 + 2 = 4"]
    with pytest.raises(DataError, match=r"record 1: no column 'frage'; the columns are question, answer"):
        read_examples(path, tokenizer, ExampleOptions(example_format=ExampleFormat(columns={"prompt": "frage"})))
    with pytest.raises(DataError, match="unknown field 'question'"):
        ExampleOptions(example_format=ExampleFormat(columns={"question": "prompt"}))


def test_fields_without_a_value_are_not_there(tmp_path, tokenizer):
    record = {"instruction": "Add.", "input": None, "output": "3", "messages": None}
    assert read_examples(write(tmp_path / "a.jsonl", [record]), tokenizer).format == "instruction"


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (
            [{"prompt": "a", "completion": " b"}, {"text": "a"}],
            r"record 2: text format, but earlier records are in completion format",
        ),
        (
            ["{\n", {"text": "a"}, {"prompt": "a", "reply": "b"}],
            r"record 3: no format matches the fields prompt, reply",
        ),
        ([{"text": "a"}, {"text": 3}], r"record 2: text must be text; got int"),
        (
            [{"messages": [{"role": "user", "content": "Hi"}]}],
            r"record 1: this is a base model without a chat template",
        ),
    ],
)
def test_records_that_cannot_be_used_are_named(tmp_path, tokenizer, records, reason):
    with pytest.raises(DataError, match=rf"a\.jsonl, {reason}"):
        read_examples(write(tmp_path / "a.jsonl", records), tokenizer)


def test_a_message_of_an_unknown_role_is_named(tmp_path, chat_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "robot", "content": "Hi"}]}])
    with pytest.raises(DataError, match=r"a\.jsonl, record 1: unknown role 'robot'"):
        read_examples(path, chat_tokenizer)


def test_the_fingerprint_is_of_ids_and_answers(tmp_path, tokenizer):
    def fingerprint(records, **options):
        return read_examples(write(tmp_path / "a.jsonl", records), tokenizer, ExampleOptions(**options)).fingerprint

    one = fingerprint(completions(3))
    assert one == fingerprint([*completions(2), {"completion": " 2", "prompt": "Number 2:", "id": 1}])
    others = [
        fingerprint(completions(2)),
        fingerprint(completions(3)[::-1]),
        fingerprint(completions(3), train_on="all"),
    ]
    assert len({one, *others}) == 4


def test_a_folder_has_its_files_for_each_use(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", completions(3))
    train, valid, test = read_splits(tmp_path, tokenizer)
    assert (len(train.examples), valid, test) == (3, None, None)
    (tmp_path / "val.json").write_text(json.dumps(completions(2)))
    (tmp_path / "test.csv").write_text("prompt,completion\na, b\n")
    train, valid, test = read_splits(tmp_path, tokenizer, validation=0.5)  # goes before the file
    assert [len(part.examples) for part in (train, valid, test)] == [1, 2, 1]
    other = write(tmp_path / "other.jsonl", completions(4))
    assert len(read_splits(tmp_path, tokenizer, validation=str(other))[1].examples) == 4
    write(tmp_path / "valid.jsonl", completions(2))
    with pytest.raises(DataError, match=r"valid\.jsonl and val\.json both exist"):
        read_splits(tmp_path, tokenizer)


def test_folders_that_cannot_be_trained_on(tmp_path, tokenizer):
    with pytest.raises(DataError, match="contains no training file"):
        read_splits(tmp_path, tokenizer)
    write(tmp_path / "train.jsonl", completions(3))
    write(tmp_path / "dev.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"dev\.jsonl has text format, but .*train\.jsonl has "):
        read_splits(tmp_path, tokenizer)


def test_a_share_is_held_out_by_content(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", completions(50) + completions(50) + ["broken\n"])

    def held_out(seed, share=0.2):
        train, valid, test = read_splits(path, tokenizer, validation=share, seed=seed)
        assert test is None
        assert (train.num_broken, valid.num_broken) == (1, 0)  # the file's is told once
        assert len(train.examples) + len(valid.examples) == 100
        assert not set(texts(train, tokenizer)) & set(texts(valid, tokenizer))  # copies stand on the same side
        return texts(valid, tokenizer)

    assert len(held_out(0)) == 20
    assert held_out(0) == held_out(0) != held_out(1)
    assert len(held_out(0, share=0.0001)) == 2  # one at least, and its copy
    with pytest.raises(DataError, match=r"validation share must be .*got 1\.5"):
        held_out(0, share=1.5)
    write(path, completions(1))
    with pytest.raises(DataError, match="has no example left to train on if"):
        read_splits(path, tokenizer, validation=0.5)


def test_an_example_as_the_model_sees_it(tmp_path, tokenizer, chat_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "She said:", "completion": " é 🎉"}])
    assert marked(read_examples(path, tokenizer).examples[0], tokenizer) == [("She said:", False), (" é 🎉", True)]
    write(path, [{"text": "A fox"}])
    assert marked(read_examples(path, tokenizer).examples[0], tokenizer) == [("A fox", True)]
    messages = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "A fox.")]
    write(path, [{"messages": [{"role": role, "content": text} for role, text in messages]}])
    (example,) = read_examples(path, chat_tokenizer).examples
    stretches = marked(example, chat_tokenizer)
    assert "".join(text for text, _ in stretches) == chat_tokenizer.decode(example.tokens.tolist())
    assert [text for text, is_answer in stretches if is_answer] == ["Hello.", "A fox."]


def test_characters_whose_bytes_are_cut_apart_come_back_whole(tokenizer):
    ids = tokenizer.encode("a 🎉")
    half = Example(np.array(ids), np.arange(len(ids)) >= len(ids) - 2)
    assert marked(half, tokenizer) == [("a ", False), ("🎉", True)]
    cut = Example(np.array(ids[:-1]), np.arange(len(ids) - 1) < 0)
    assert marked(cut, tokenizer) == [("a \ufffd", False)]
    assert marked(Example(np.array([1]), np.array([False])), tokenizer) == []


def test_a_long_prompt_keeps_bos_and_its_end(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [{"prompt": "The old fox ran to the river", "completion": " and slept."}])
    (whole,) = read_examples(tmp_path / "a.jsonl", tokenizer).examples
    begin = int(whole.completion_mask.argmax())
    (short,) = read_examples(tmp_path / "a.jsonl", tokenizer, ExampleOptions(max_prompt=4)).examples
    assert short.tokens.tolist() == [1, *whole.tokens[begin - 3 :].tolist()]
    assert short.completion_mask.tolist() == [False] * 4 + whole.completion_mask[begin:].tolist()


def test_a_file_with_nothing_but_broken_lines_says_what_is_wrong_with_them(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "half \ud83d"}])
    with pytest.raises(DataError, match=r"no example to train on: broken: line 1: contains a lone surrogate"):
        read_examples(path, tokenizer)


def test_each_cause_of_examples_left_out_is_counted(tmp_path, tokenizer):
    long, no_answer = {"prompt": "a " * 30, "completion": " b"}, {"prompt": "a", "completion": " "}
    path = write(tmp_path / "a.jsonl", [*completions(2), long, long, no_answer])
    examples = read_examples(path, tokenizer, ExampleOptions(max_length=20))
    assert examples.left_out == {"have no answer within 20 tokens": 2, "have no answer": 1}
    assert examples.longest == len(tokenizer.encode("a " * 30 + " b")) + 1
    dropped = read_examples(path, tokenizer, ExampleOptions(max_length=20, too_long="drop"))
    assert dropped.left_out == {"are longer than 20 tokens": 2, "have no answer": 1}
    pairs = [{"prompt": "a", "chosen": " b", "rejected": end} for end in (" b", " c", "")]
    assert read_examples(write(tmp_path / "b.jsonl", pairs), tokenizer).left_out == {
        "have equal answers": 1,
        "have no answer": 1,
    }


def test_the_format_of_the_examples_is_what_the_records_and_the_options_say(tmp_path, tokenizer, chat_tokenizer):
    asked = ExampleFormat(separator="\n", columns={"prompt": "q"})
    path = write(tmp_path / "a.jsonl", [{"q": "Who?", "completion": "A fox."}])
    found = read_examples(path, tokenizer, ExampleOptions(example_format=asked))
    assert found.example_format == ExampleFormat("completion", {"prompt": "q"}, "", "\n")
    assert texts(found, tokenizer) == ["Who?\nA fox."]
    assert found.num_meeting == 0
    meeting = read_examples(write(tmp_path / "b.jsonl", [{"prompt": "Who?", "completion": "A"}]), tokenizer)
    assert meeting.num_meeting == 1
    turns = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    pairs = [{"prompt": turns[0], "chosen": turns[1], "rejected": [{"role": "assistant", "content": "c"}]}]
    found = read_examples(write(tmp_path / "c.jsonl", pairs), chat_tokenizer)
    assert found.example_format.style == "chat"
