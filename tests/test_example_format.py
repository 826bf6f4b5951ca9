import json

import numpy as np
import pytest

from conftest import ADAPTED_CONFIG, ADAPTERS, SMALL_CONFIG, random_model, write_folder
from mlx_openelm import ExampleFormat, Tokenizer, load
from mlx_openelm.conversion.adapters.forms import convert_adapter, open_adapter
from mlx_openelm.data.formats import encode_record, meets_without_space
from mlx_openelm.errors import AdapterError, ConfigError, DataError, TokenizerError
from mlx_openelm.model.adapters import about_base, read_adapter, save_adapter
from mlx_openelm.model.lora import adapter_parameters, add_adapter
from mlx_openelm.tokenizer.example_format import format_of, parse_columns
from mlx_openelm.tokenizer.files import write_tokenizer

COMPLETION = {"prompt": "The fox", "completion": "ran home."}
INSTRUCTION = {"instruction": "The fox", "output": "ran home."}
PAIR = {"prompt": "The fox", "chosen": "ran home.", "rejected": "slept."}
CHAT = {"messages": [{"role": "user", "content": "The fox"}, {"role": "assistant", "content": "ran home."}]}


@pytest.fixture
def ours(tokenizer_path):
    """A tokenizer that a test may change."""
    return Tokenizer(tokenizer_path, chat_template="openelm")


@pytest.mark.parametrize(
    ("example_format", "record"),
    [
        (ExampleFormat("completion"), COMPLETION),
        (ExampleFormat("completion", separator="\nA: "), COMPLETION),
        (ExampleFormat("completion", separator=" "), COMPLETION),
        (ExampleFormat("completion", prompt_style="chat"), COMPLETION),
        (ExampleFormat("completion", prompt_style="instruction"), COMPLETION),
        (ExampleFormat("instruction"), INSTRUCTION),
        (ExampleFormat("instruction", indent=16), INSTRUCTION),
        (ExampleFormat("instruction", prompt_style="chat"), INSTRUCTION),
        (ExampleFormat("preference", separator=": "), PAIR),
        (ExampleFormat("preference", prompt_style="instruction"), PAIR),
        (ExampleFormat("preference", prompt_style="chat"), PAIR),
        (ExampleFormat("chat"), CHAT),
    ],
)
def test_a_prompt_is_presented_as_in_the_examples(ours, example_format, record):
    example = encode_record(example_format, record, ours).sequences[0]
    ours.example_format = example_format
    before = int(np.argmax(example.completion_mask))
    assert example.tokens[:before].tolist() == ours.encode_prompt("The fox")
    answer = ours.decode(example.tokens[before:].tolist()).strip()
    assert answer == "ran home."


def test_an_instruction_s_input_is_presented_too(ours):
    record = {**INSTRUCTION, "input": "At night."}
    for style in ("instruction", "chat", "plain"):
        ours.example_format = ExampleFormat("instruction", prompt_style=style)
        example = encode_record(ours.example_format, record, ours)
        before = int(np.argmax(example.completion_mask))
        assert example.tokens[:before].tolist() == ours.encode_prompt("The fox", input="At night."), style


def test_spaces_at_the_end_of_a_separator_belong_to_the_answer(tokenizer):
    """As in running text, where tokens begin with their space."""
    asked = ExampleFormat("completion", separator="\nA: ")
    assert (asked.prompt_text("The fox"), asked.answer_text("ran")) == ("The fox\nA:", " ran")
    example = encode_record(asked, COMPLETION, tokenizer)
    assert example.tokens.tolist() == [*tokenizer.encode("The fox\nA: ran home."), tokenizer.eos_token_id]


def test_flags_go_before_what_is_remembered(ours):
    plain, chat = ours.encode("Hi"), ours.encode_chat([{"role": "user", "content": "Hi"}])
    ours.example_format = ExampleFormat("instruction")
    assert ours.encode_prompt("Hi") not in (plain, chat)
    assert ours.encode_prompt("Hi", chat=False) == plain
    assert ours.encode_prompt("Hi", chat=True) == chat
    with pytest.raises(TokenizerError, match=r"requires a chat template, but the model was tuned on .* instruction"):
        ours.encode_prompt("Hi", system="Be brief.")
    ours.example_format = ExampleFormat("text")  # text to continue, whatever template the model has
    assert ours.encode_prompt("Hi") == plain


def test_a_remembered_chat_needs_its_template(tokenizer_path):
    base = Tokenizer(tokenizer_path)
    base.example_format = ExampleFormat("chat")
    with pytest.raises(TokenizerError, match="without a chat template"):
        base.encode_prompt("Hi")


FORMAT = ExampleFormat("completion", {"prompt": "question"}, "plain", "\n", 3)


@pytest.fixture
def adapter(tmp_path):
    model = random_model(ADAPTED_CONFIG)
    add_adapter(model, ADAPTERS["lora"])
    folder = tmp_path / "adapter"
    folder.mkdir()
    about = about_base("base", ADAPTED_CONFIG), None, FORMAT
    save_adapter(folder, adapter_parameters(model), "lora", ADAPTERS["lora"], *about)
    return folder


def test_an_adapter_records_it_beside_the_fields_of_mlx_lm(adapter):
    assert read_adapter(adapter).example_format == FORMAT
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert {"fine_tune_type", "num_layers", "lora_parameters"} < set(values)
    del values["example_format"]  # as mlx-lm writes it
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    assert read_adapter(adapter).example_format is None


def test_it_survives_a_conversion_or_is_reported_as_lost(adapter, tmp_path):
    convert_adapter(adapter, tmp_path / "mlx-lm", to="mlx-lm")
    assert open_adapter(tmp_path / "mlx-lm").example_format == FORMAT
    found = convert_adapter(adapter, tmp_path / "peft", to="peft")
    assert "does not record that prompts were in completion format" in found.warnings[0]
    assert open_adapter(tmp_path / "peft").example_format is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"records": "poem"}, "unknown format of records 'poem'"),
        ({"prompt_style": "loud"}, "unknown prompt style 'loud'"),
        ({"columns": {"prompt": 3}}, "prompt must be text"),
        ({"columns": {"other": "x"}}, "unknown field 'other'"),
        ({"columns": []}, "columns must be an object"),
        ({"separator": "x" * 1001}, "separator must have at most 1,000"),
        ({"separator": 5}, "separator must be text"),
        ({"indent": 10**9}, "indent must be from 0 to 1,000"),
        ({"indent": -1}, "indent must be"),
    ],
)
def test_a_damaged_record_is_named(adapter, change, said):
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    values["example_format"].update(change)
    path.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=f"adapter_config.json: example_format.*{said}"):
        read_adapter(adapter)


def test_a_folder_keeps_it_with_its_tokenizer(tmp_path, ours):
    write_folder(tmp_path / "model", random_model(SMALL_CONFIG), ours)
    ours.example_format = FORMAT
    write_tokenizer(ours, tmp_path / "model")
    assert load(tmp_path / "model")[1].example_format == FORMAT


@pytest.mark.parametrize(
    ("prompt", "answer", "separator", "meets"),
    [
        ("What is red?", "The ball.", "", True),
        ("What is red?", " The ball.", "", False),
        ("What is red? ", "The ball.", "", False),
        ("What is red?", "The ball.", "\n", False),
        ("What is red?", "The ball.", " ", False),
        ("红色是什么？", "球。", "", False),
        ("2 + 2 =", "4", "", True),
        ("Add", ": 4", "", False),
    ],
)
def test_prompts_that_run_into_their_answers(prompt, answer, separator, meets):
    asked = ExampleFormat("completion", separator=separator)
    assert meets_without_space(asked, {"prompt": prompt, "completion": answer}) == meets
    assert meets_without_space(asked, {"prompt": prompt, "chosen": answer}) == meets
    assert not meets_without_space(ExampleFormat(prompt_style="chat"), {"prompt": prompt, "completion": answer})


def test_columns_as_they_are_typed():
    assert parse_columns(" prompt = question,completion=a=b, ") == {"prompt": "question", "completion": "a=b"}
    assert parse_columns("") == {}
    for typed in ("question", "prompt=", "=question", "prompt=a,b"):
        with pytest.raises(ConfigError, match=f"columns must be written as prompt=.*got '{typed}'"):
            parse_columns(typed)


def test_fields_without_a_format_lead_to_the_option_that_names_them():
    with pytest.raises(DataError, match=r"question, answer .*`columns=prompt=question,completion=answer`"):
        format_of({"question": "", "answer": ""})
