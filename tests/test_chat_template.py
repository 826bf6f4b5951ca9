import json
import sys

import numpy as np
import pytest

from mlx_openelm import Tokenizer, convert, generate, load, merge, tune
from mlx_openelm.data.formats import encode_conversation
from mlx_openelm.errors import OpenELMError, TokenizerError
from mlx_openelm.tokenizer import sandbox
from mlx_openelm.tokenizer.chat_template import (
    OPENELM_TEMPLATE,
    is_openelm,
    named_template,
    read_chat_template,
    render_template,
    template_by_name,
)
from mlx_openelm.tokenizer.files import write_tokenizer
from mlx_openelm.training.tune_recipe import TuneRecipe

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hello, fox!\n"},
    {"role": "assistant", "content": "Hi </s> café 日本."},
    {"role": "user", "content": ""},
]


def rendered(template, messages=(), **values):
    about = {
        "add_generation_prompt": True,
        "tokens": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        **values,
    }
    return render_template(template, messages, **about)


def named(name, template):
    return {"name": name, "template": template}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "A"}}, "A"),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        ({"tokenizer_config.json": {"chat_template": "A"}, "chat_template.jinja": "B"}, "B"),
        ({"chat_template.json": {"chat_template": "C"}}, "C"),
        ({"tokenizer_config.json": {"chat_template": [named("rag", "R"), named("default", "D")]}}, "D"),
        ({"tokenizer_config.json": {"chat_template": [named("only", "O")]}}, "O"),
        ({"tokenizer_config.json": {"chat_template": {"default": "D", "tool_use": "T"}}}, "D"),
    ],
)  # fmt: skip
def test_a_template_is_read_wherever_a_folder_keeps_it(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_chat_template(tmp_path) == expected


@pytest.mark.parametrize(
    "template", [[], [{"name": "a"}], [{"name": "a", "template": "A"}] * 1 + [{"name": "b"}], 5, {}]
)
def test_an_entry_without_a_template_is_refused(tmp_path, template):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template must be text"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize("content", [b"\xff", b"x" * (1 << 20) + b"x"])
def test_a_template_file_that_cannot_be_one_is_refused(tmp_path, content):
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        read_chat_template(tmp_path)


def test_the_name_of_an_instruct_model():
    for name in (
        "OpenELM-270M-Instruct",
        "models--apple--OpenELM-3B-Instruct",
        "openelm_1_1b_instruct-4bit",
        "270MInstruct",
    ):
        assert template_by_name(name) == OPENELM_TEMPLATE
    for name in ("OpenELM-270M", "instructor-course", "instructions", ""):
        assert template_by_name(name) is None


def test_the_built_in_template_is_known_in_both_of_its_forms():
    assert is_openelm(OPENELM_TEMPLATE + "\n")
    assert is_openelm(OPENELM_TEMPLATE.replace("{{ bos_token }}", ""))
    assert not is_openelm(CHATML)


class TestRendering:
    def test_as_transformers_does(self, tmp_path, tokenizer):
        from transformers import AutoTokenizer

        for template in (
            OPENELM_TEMPLATE,
            CHATML,
            "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ unk_token }}{{ eos_token }}",
        ):
            write_tokenizer(Tokenizer(tokenizer.path, chat_template=template), tmp_path)
            (tmp_path / "config.json").write_text('{"model_type": "openelm"}')
            other = AutoTokenizer.from_pretrained(tmp_path)
            ours = Tokenizer(tmp_path / "tokenizer.json", chat_template=read_chat_template(tmp_path))
            for prompt in (True, False):
                text = other.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
                assert rendered(template, MESSAGES, add_generation_prompt=prompt) == text
                if template != OPENELM_TEMPLATE:  # where a user's `</s>` stays text, and in `transformers` it does not
                    ids = other.encode(text, add_special_tokens=False)
                    assert ours.encode_chat(MESSAGES, add_generation_prompt=prompt) == ids

    def test_what_templates_of_other_models_use(self):
        assert (
            rendered("{{ messages | tojson }}", [{"role": "user", "content": "é<"}])
            == '[{"role": "user", "content": "é<"}]'
        )
        assert rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
        assert rendered("  {% if true %}\n  a\n  {% endif %}\n") == "  a\n"
        assert rendered("{% generation %}a{% endgeneration %}") == "a"
        assert rendered("{{ strftime_now('%Y') }}").isdigit()

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
            ("{{ messages[3]['content'] }}", "no element 3"),
            ("{% for", "not valid"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
            ("{{ messages.append(1) }}", "unsafe"),
            ("{% for i in range(10 ** 9) %}{% endfor %}", "too large"),
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 100,000"),
            ("{{ 'x' * 999999999 }}", "too large"),
            ("{% for i in range(2000) %}{{ 'x' * 100000 }}{% endfor %}", "writes more than"),
            (
                "{% set n = namespace(x='x' * 9999) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
                "too large",
            ),
            ("{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}", "too large"),
            ("{{ '%3000000000d' % 1 }}", "too large"),
            ("{{ 'a' | center(3000000000) }}", "too large"),
            ("{{ 'a' | indent(3000000000) }}", "too large"),
            ("{{ 'a'.ljust(3000000000) }}", "too large"),
            ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "too large"),
            ("{{ '{:3000000000}'.format(1) }}", "too large"),
            ("{{ lipsum(n=200000) }}", "undefined"),
        ],
    )
    def test_a_template_that_asks_for_too_much_is_refused_in_one_line(self, template, reason):
        with pytest.raises(TokenizerError, match=reason) as caught:
            rendered(template)
        assert "\n" not in str(caught.value)

    def test_loops_that_take_too_long_end(self, monkeypatch):
        monkeypatch.setattr(sandbox, "_LONGEST_SECONDS", 0.2)
        loops = "{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}{% endfor %}"
        with pytest.raises(TokenizerError, match="takes longer than"):
            rendered("{% set s = 'x' * 3000 %}" + loops)
        assert sys.gettrace() is None or "watch" not in repr(sys.gettrace())

    def test_nested_parentheses_end_in_an_error(self):
        with pytest.raises(TokenizerError, match="not valid"):
            rendered("{{ " + "(" * 5000 + ")" * 5000 + " }}")


def test_the_mask_of_a_conversation_in_another_template(tokenizer):
    """It covers what the assistant says and the EOS after it, nothing of the template around them."""
    ours = Tokenizer(tokenizer.path, chat_template=CHATML)
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long."},
    ]
    example = encode_conversation(conversation, ours)
    runs = np.split(np.arange(len(example.tokens)), np.flatnonzero(np.diff(example.completion_mask)) + 1)
    learnt = [example.tokens[run].tolist() for run in runs if example.completion_mask[run[0]]]
    assert [ours.decode(run).strip() for run in learnt] == ["Hello.", "So long."]
    assert all(run[-1] == ours.eos_token_id for run in learnt)
    assert example.tokens[-1] == ours.eos_token_id
    only_last = encode_conversation(conversation, ours, first=2)
    assert only_last.completion_mask.sum() == len(learnt[1])


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path, tiny_folder):
        import shutil

        shutil.copytree(tiny_folder, tmp_path / "source")
        return tmp_path / "source"

    def test_a_template_that_is_not_ours_is_kept_and_used(self, tmp_path, folder, tokenizer):
        (folder / "chat_template.jinja").write_text(CHATML)
        convert(folder, tmp_path / "Out-Instruct", dtype="float32")
        assert json.loads((tmp_path / "Out-Instruct" / "tokenizer_config.json").read_text())["chat_template"] == CHATML
        _, ours = load(tmp_path / "Out-Instruct")
        assert ours.render_chat(MESSAGES[:1]) == "<|im_start|>system\nBe brief.</s>\n<|im_start|>assistant\n"
        assert ours.encode_prompt("Hi") == tokenizer.encode(
            "<|im_start|>user\nHi</s>\n<|im_start|>assistant\n", bos=False, control_tokens=True
        )

    def test_a_folder_gives_the_same_wherever_it_lies(self, tmp_path, folder):
        convert(folder, tmp_path / "base", dtype="float32")
        for name in ("instruct/models/story", "models/My-Instruct"):
            place = tmp_path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "base").rename(place)
            assert not load(place)[1].has_chat_template
            convert(place, tmp_path / "again", force=True)
            assert not load(tmp_path / "again")[1].has_chat_template
            place.rename(tmp_path / "base")

    def test_the_folder_s_own_name_and_the_repository_s_count_for_a_source_of_others(self, tmp_path, folder):
        for place, expected in (
            ("OpenELM-270M-Instruct", True),
            ("models--apple--OpenELM-270M-Instruct/snapshots/4f3a", True),
            ("models--apple--OpenELM-270M/snapshots/instruct", False),
            ("instruct/OpenELM-270M", False),
        ):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            folder.rename(tmp_path / place)
            assert load(tmp_path / place)[1].has_chat_template == expected, place
            (tmp_path / place).rename(folder)

    def test_convert_gives_a_base_model_a_template(self, tmp_path, folder):
        (tmp_path / "chatml.jinja").write_text(CHATML)
        for name, text in (("openelm", OPENELM_TEMPLATE), (tmp_path / "chatml.jinja", CHATML)):
            convert(folder, tmp_path / "out", chat_template=name, force=True)
            assert load(tmp_path / "out")[1].chat_template == text
        command = (tmp_path / "out" / "README.md").read_text()
        assert "--chat-template chatml.jinja" in command

    @pytest.mark.parametrize("name", ["chatml", "missing.jinja", "~nobody"])
    def test_a_template_that_does_not_exist_is_named(self, tmp_path, folder, name):
        with pytest.raises(OpenELMError, match=name):
            convert(folder, tmp_path / "out", chat_template=name)

    def test_a_template_with_an_error_is_refused_before_anything_is_written(self, tmp_path, folder):
        (tmp_path / "bad.jinja").write_text("{% for")
        with pytest.raises(TokenizerError, match="not valid"):
            convert(folder, tmp_path / "out", chat_template=tmp_path / "bad.jinja")
        assert not (tmp_path / "out").exists()

    def test_an_adapter_brings_the_template_that_it_was_tuned_with(self, tmp_path, folder):
        data = tmp_path / "chat.jsonl"
        pair = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        data.write_text("".join(json.dumps({"messages": pair}) + "\n" for _ in range(4)))
        (tmp_path / "chatml.jinja").write_text(CHATML)
        recipe = TuneRecipe(
            model=folder, data=data, steps=2, batch_size=2, rank=2, chat_template=tmp_path / "chatml.jinja"
        )
        tune(recipe, tmp_path / "adapter")
        assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == CHATML
        model, ours = load(folder, adapter=tmp_path / "adapter")
        assert ours.chat_template == CHATML
        assert generate(model, ours, ours.encode_prompt("Hi"), max_tokens=2) is not None
        merge(folder, tmp_path / "adapter", tmp_path / "merged")
        assert load(tmp_path / "merged")[1].chat_template == CHATML

    def test_named_templates(self, tmp_path):
        assert named_template("openelm") == OPENELM_TEMPLATE
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
        assert named_template(tmp_path / "tokenizer_config.json") == CHATML
