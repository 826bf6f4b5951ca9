"""The plugin for the `llm` command, tested with the real one."""

import json
from dataclasses import replace

import pytest

llm = pytest.importorskip("llm")

from click.testing import CliRunner  # noqa: E402
from llm.cli import cli  # noqa: E402
from llm.plugins import load_plugins, pm  # noqa: E402

from conftest import SMALL_CONFIG, random_model, write_folder  # noqa: E402
from mlx_openelm import generate, llm_plugin, load  # noqa: E402

PROMPT = "Once upon a time there was"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of `llm` for the test alone, and the plugin, whether it is installed or not."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    load_plugins()
    registered = pm.is_registered(llm_plugin)
    if not registered:
        pm.register(llm_plugin)
        llm_plugin.register_commands(cli)
    return tmp_path


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, chat_tokenizer):
    folder = tmp_path_factory.mktemp("models") / "OpenELM-small-Instruct"
    write_folder(folder, random_model(replace(SMALL_CONFIG, max_context_length=512)), chat_tokenizer)
    return folder


def run(*words, **options):
    return CliRunner().invoke(cli, [str(word) for word in words], **options)


def succeed(*words, **options):
    done = run(*words, **options)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_built_in_model_continues_a_prompt_as_generate_does():
    model, tokenizer = load("openelm-tiny")
    expected = generate(model, tokenizer, PROMPT, max_tokens=8)
    assert succeed("-m", "openelm-tiny", PROMPT, "-o", "max_tokens", 8, "--no-log").rstrip("\n") == expected
    assert succeed("-m", "openelm-tiny", PROMPT, "-o", "max_tokens", 8, "--no-stream", "-n").rstrip("\n") == expected


def test_text_arrives_while_it_is_generated():
    response = llm.get_model("openelm-tiny").prompt(PROMPT, max_tokens=8)
    pieces = list(response)
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == response.text()
    assert (response.usage().input, response.usage().output) == (7, 8)


def test_options_are_those_of_the_sampling_configuration():
    model = llm.get_model("openelm-tiny")
    first, again, other = (model.prompt(PROMPT, max_tokens=12, temperature=1.0, seed=seed).text() for seed in (1, 1, 2))
    assert first == again != other
    assert " little" not in model.prompt(PROMPT, max_tokens=12, stop=" little").text()
    failed = run("-m", "openelm-tiny", PROMPT, "-o", "top_p", 3)
    assert "top_p must be above 0 and at most 1; got 3.0" in failed.output
    assert "Extra inputs are not permitted" in run("-m", "openelm-tiny", PROMPT, "-o", "heat", 3).output


def test_a_sampled_answer_logs_the_seed_that_repeats_it():
    model = llm.get_model("openelm-tiny")
    drawn = model.prompt(PROMPT, max_tokens=8, temperature=1.0)
    text = drawn.text()
    seed = drawn.response_json["seed"]
    assert model.prompt(PROMPT, max_tokens=8, temperature=1.0, seed=seed).text() == text


class TestModelsOfOnesOwn:
    def test_are_added_listed_and_removed(self, place, chat_model):
        assert 'llm -m mine "' in succeed("openelm", "add", chat_model, "--name", "mine")
        assert f"mine: {chat_model}" in succeed("openelm", "list")
        assert "OpenELMModel: mine" in succeed("models", "list")
        assert succeed("-m", "mine", "Hello", "-o", "max_tokens", 4) is not None
        succeed("openelm", "remove", "mine")
        assert "mine" not in succeed("models", "list")
        assert chat_model.exists()

    def test_are_refused_if_they_are_not_there(self, place, chat_model):
        assert "does not exist" in run("openelm", "add", place / "nothing").output
        assert "nowhere does not exist" in run("openelm", "add", chat_model, "--adapter", "nowhere").output
        assert "built-in" in run("openelm", "add", chat_model, "--name", "openelm-tiny").output
        assert "nothing is not among" in run("openelm", "remove", "nothing").output
        assert not (place / "llm" / "openelm.json").exists()

    def test_a_damaged_list_hides_only_them(self, place):
        (place / "llm").mkdir()
        for text in ("{", "[1]", '{"a": 3, "b": {"model": null}}'):
            (place / "llm" / "openelm.json").write_text(text)
            assert succeed("openelm", "list").startswith("openelm-tiny: built in")


class TestConversations:
    def messages(self, monkeypatch, chat_model):
        seen = []
        succeed("openelm", "add", chat_model, "--name", "mine")
        encoded = llm_plugin._encoded

        def remember(tokenizer, messages, chat):
            ids = encoded(tokenizer, messages, chat)
            seen.append([(message.role, message.parts[0].text) for message in messages])
            if chat:
                assert ids == tokenizer.encode_chat([{"role": role, "content": text} for role, text in seen[-1]])
            return ids

        monkeypatch.setattr(llm_plugin, "_encoded", remember)
        return seen

    def test_a_later_turn_has_those_before_it(self, monkeypatch, chat_model):
        seen = self.messages(monkeypatch, chat_model)
        answer = succeed("-m", "mine", "Hello", "-s", "Be brief.", "-o", "max_tokens", 4).removesuffix("\n")
        succeed("-c", "And then?", "-o", "max_tokens", 4)
        assert seen[0] == [("system", "Be brief."), ("user", "Hello")]
        assert seen[1] == [*seen[0], ("assistant", answer), ("user", "And then?")]

    def test_keys_and_values_of_earlier_turns_are_reused(self, monkeypatch, chat_model):
        self.messages(monkeypatch, chat_model)
        conversation = llm.get_model("mine").conversation()
        conversation.prompt("Hello", max_tokens=4).text()
        _, _, cache = llm_plugin._loaded(str(chat_model), None)
        reused = []
        reuse = cache.reuse
        monkeypatch.setattr(cache, "reuse", lambda ids: reused.append(reuse(ids)) or reused[-1])
        conversation.prompt("And then?", max_tokens=4).text()
        assert len(reused[0][0]) > 5

    def test_raw_text_takes_no_system_prompt(self, monkeypatch, chat_model):
        self.messages(monkeypatch, chat_model)
        failed = run("-m", "mine", "Hello", "-s", "Be brief.", "-o", "raw", 1)
        assert "a system prompt requires a chat template" in failed.output
        assert failed.exit_code == 1


def test_an_adapter_is_applied(place, chat_model, monkeypatch):
    asked = []
    monkeypatch.setattr(llm_plugin, "_loaded", lambda *paths: asked.append(paths) or load_small(chat_model))
    (place / "my-adapter").mkdir()
    succeed("openelm", "add", chat_model, "--name", "mine", "--adapter", place / "my-adapter")
    llm.get_model("mine").prompt("Hello", max_tokens=2).text()
    assert asked == [(str(chat_model), str(place / "my-adapter"))]
    assert json.loads((place / "llm" / "openelm.json").read_text())["mine"]["adapter"] == str(place / "my-adapter")


def load_small(folder):
    from mlx_openelm import PromptCache

    model, tokenizer = load(folder)
    return model, tokenizer, PromptCache(model)
