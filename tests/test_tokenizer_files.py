import json
import shutil

import pytest

from conftest import train_sentencepiece
from mlx_openelm import Tokenizer, convert, load
from mlx_openelm.errors import SourceError, TokenizerError
from mlx_openelm.tokenizer import files as tokenizer_files
from mlx_openelm.tokenizer.files import LLAMA_REPO, PUBLIC_COPIES, find_tokenizer, has_tokenizer, write_tokenizer

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.fixture
def offline(monkeypatch):
    """A hub that nobody reaches and a cache that holds nothing; both can be filled."""
    cache, hub = {}, {}

    def download(repo, name):
        if repo not in hub:
            raise SourceError(f"{repo} cannot be reached")
        return hub[repo]

    monkeypatch.setattr(tokenizer_files, "cached_file", lambda repo, name: cache.get(repo))
    monkeypatch.setattr(tokenizer_files, "download_file", download)
    return cache, hub


@pytest.fixture
def llama(monkeypatch, tokenizer):
    """Lets the tests' tokenizer pass for Llama's."""
    monkeypatch.setattr(tokenizer_files, "LLAMA_VOCAB_HASH", tokenizer.vocab_hash())
    monkeypatch.setattr(tokenizer_files, "LLAMA_VOCAB_SIZE", tokenizer.vocab_size)
    return tokenizer.path


@pytest.fixture(scope="module")
def unigram(tmp_path_factory, tokenizer_path):
    """A SentencePiece model that is not BPE, and normalises texts."""
    folder = tmp_path_factory.mktemp("unigram")
    text = tokenizer_path.with_name("text.txt").read_text()
    changed = {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    return train_sentencepiece(folder, text, vocab_size=330, hard_vocab_limit=False, **changed)


def test_what_was_asked_for_comes_first(tmp_path, tokenizer_path):
    found, origin = find_tokenizer(str(tokenizer_path), tmp_path, 400, chat_template="openelm")
    assert (found.vocab_size, origin, found.has_chat_template) == (400, "tokenizer.model", True)


def test_the_models_own_comes_next(offline, tiny_folder):
    found, origin = find_tokenizer(None, tiny_folder, 400)
    assert found.path == tiny_folder / "tokenizer.model"
    assert origin == "the model's own"


def test_then_the_cache_then_the_hub_then_public_copies(offline, llama, tmp_path):
    cache, hub = offline
    hub[PUBLIC_COPIES[1]] = llama
    assert find_tokenizer(None, tmp_path, 400)[1] == PUBLIC_COPIES[1]
    hub[LLAMA_REPO] = llama
    assert find_tokenizer(None, tmp_path, 400)[1] == LLAMA_REPO
    cache[PUBLIC_COPIES[0]] = llama
    assert find_tokenizer(None, tmp_path, 400)[1] == f"{PUBLIC_COPIES[0]}, from the Hugging Face cache"


def test_copies_with_another_vocabulary_are_not_believed(offline, monkeypatch, tokenizer_path, tmp_path):
    monkeypatch.setattr(tokenizer_files, "LLAMA_VOCAB_SIZE", 400)
    _, hub = offline
    hub[PUBLIC_COPIES[0]] = tokenizer_path
    with pytest.raises(TokenizerError, match=rf"{PUBLIC_COPIES[0]} \(its vocabulary is not Llama's\)"):
        find_tokenizer(None, tmp_path, 400)


def test_failure_names_every_place_and_three_ways_out(offline, tmp_path):
    with pytest.raises(TokenizerError) as caught:
        find_tokenizer(None, tmp_path, 32000)
    message = str(caught.value)
    for place in (str(tmp_path), "cache", LLAMA_REPO, *PUBLIC_COPIES):
        assert place in message
    for way in ("Set `tokenizer` to a file", "hf auth login", "`tokenizer=none`"):
        assert way in message
    assert "\n" not in message


def test_tokens_added_beyond_the_embedding_are_left_out(tmp_path, tokenizer):
    """Llama's files were published with a padding token that the models have no row for."""
    write_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 400}')
    found, _ = find_tokenizer(str(tmp_path), None, 400)
    assert (found.vocab_size, found.encode("a <pad>")) == (400, tokenizer.encode("a <pad>"))
    assert find_tokenizer(str(tmp_path), None, 401)[0].vocab_size == 401
    write_tokenizer(tokenizer, tmp_path)
    for name in ("tokenizer.model", "added_tokens.json"):
        (tmp_path / name).unlink()
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["added_tokens"].append({"id": 400, **ADDED, "content": "<pad>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    assert find_tokenizer(str(tmp_path), None, 400)[0].vocab_size == 400
    assert find_tokenizer(str(tmp_path), None, 401)[0].vocab_size == 401


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer_path):
    with pytest.raises(TokenizerError, match="400 tokens, but the model has only 399"):
        find_tokenizer(str(tokenizer_path), None, 399)


def test_a_folder_without_one_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        find_tokenizer(str(tmp_path), None, 400)
    assert not has_tokenizer(tmp_path)
    assert not has_tokenizer(None)


def test_written_files_hold_the_template_of_instruct_models_only(tmp_path, tokenizer, chat_tokenizer):
    for folder, written in (("base", tokenizer), ("chat", chat_tokenizer)):
        (tmp_path / folder).mkdir()
        write_tokenizer(written, tmp_path / folder)
        settings = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        assert ("chat_template" in settings) == written.has_chat_template
        assert (tmp_path / folder / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()


def test_transformers_reads_the_written_files(tmp_path, chat_tokenizer):
    from transformers import AutoTokenizer

    write_tokenizer(chat_tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "openelm"}')
    other = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Once upon a time", "  é\n日本 🎉", "", "cafe\u0301 <|user|>"):
        assert other.encode(text) == chat_tokenizer.encode(text)
        assert other.decode(other.encode(text), skip_special_tokens=True) == chat_tokenizer.decode(other.encode(text))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, fox!"}]
    rendered = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>" + chat_tokenizer.render_chat(messages)
    assert other.encode(rendered, add_special_tokens=False) == chat_tokenizer.encode_chat(messages)


def test_other_algorithms_are_written_as_they_are(tmp_path, unigram):
    (tmp_path / "out").mkdir()
    write_tokenizer(Tokenizer(unigram), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer.model", "tokenizer_config.json"]


class TestAddedTokens:
    """Tokens that were added to Llama's vocabulary, in every way in which folders keep them."""

    def folder(self, place, tokenizer, how):
        place.mkdir()
        settings = {
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "chat_template": "{{ messages[0]['content'] }}<|im_end|>",
        }
        if how == "json":
            write_tokenizer(tokenizer, place)
            written = json.loads((place / "tokenizer.json").read_text())
            for token, name in ((400, "<|im_start|>"), (401, "<|im_end|>")):
                written["added_tokens"].append({"id": token, "content": name, **ADDED, "special": True})
            (place / "tokenizer.json").write_text(json.dumps(written))
        else:
            (place / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
            settings["additional_special_tokens"] = ["<|im_start|>"]
        if how == "model":
            (place / "added_tokens.json").write_text('{"<|im_start|>": 400, "<|im_end|>": 401}')
        if how == "decoder":
            names = {"400": "<|im_start|>", "401": "<|im_end|>"}
            decoder = {token: {"content": name, "special": True} for token, name in names.items()}
            settings["added_tokens_decoder"] = decoder
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
        return place

    @pytest.mark.parametrize("how", ["json", "model", "decoder"])
    def test_they_survive(self, tmp_path, tokenizer, how):
        from tokenizers import Tokenizer as Package
        from transformers import AutoTokenizer

        found, _ = find_tokenizer(str(self.folder(tmp_path / "source", tokenizer, how)), None, 402)
        (tmp_path / "out").mkdir()
        write_tokenizer(found, tmp_path / "out")
        assert not (tmp_path / "out" / "tokenizer.model").exists()  # it does not know them
        again, _ = find_tokenizer(str(tmp_path / "out"), None, 402)
        package = Package.from_file(str(tmp_path / "out" / "tokenizer.json"))
        (tmp_path / "out" / "config.json").write_text('{"model_type": "openelm"}')
        other = AutoTokenizer.from_pretrained(tmp_path / "out")
        for ours in (found, again):
            assert (ours.vocab_size, ours.eos_token_id, ours.bos_token_id) == (402, 401, 1)
            for text in ("Hi<|im_end|> there", "<|im_start|>user\n  é", "a </s> fox", ""):
                marked = ours.encode(text, control_tokens=True)
                assert marked == package.encode(text).ids == other.encode(text)
                assert ours.encode(text) == other.encode(text, split_special_tokens=True)
                assert ours.decode(ours.encode(text)) == text
            assert ours.encode("Hi<|im_end|>", control_tokens=True)[-1] == 401
            assert 401 not in ours.encode("Hi<|im_end|>")
            assert ours.decode([*tokenizer.encode("a fox"), 400, 401]) == "a fox"
        assert (other.eos_token, other.eos_token_id) == ("<|im_end|>", 401)

    def test_the_model_stops_at_the_added_eos(self, tmp_path, tiny_folder, tokenizer):
        place = shutil.copytree(tiny_folder, tmp_path / "source")
        (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer.pieces()[398]}))
        model, found = load(place)
        assert found.eos_token_id == 398
        assert model.config.eos_token_ids == (2, 398)
        convert(place, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 398]

    @pytest.mark.parametrize(
        "content",
        [
            '{"<pad>": "x"}',
            '{"<pad>": -1}',
            '{"<pad>": 1e99}',
            '{"<pad>": null}',
            "[",
            "[]",
            '{"quick": 5}',
            '{"<pad>": 999999999999}',
        ],
    )
    def test_damaged_lists_are_refused(self, tmp_path, tokenizer, content):
        write_tokenizer(tokenizer, tmp_path)
        (tmp_path / "added_tokens.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"added_tokens\.json"):
            Tokenizer(tmp_path / "tokenizer.model")

    @pytest.mark.parametrize(
        "settings",
        [
            {"added_tokens_decoder": "x"},
            {"added_tokens_decoder": {"400": "x"}},
            {"added_tokens_decoder": {"x": {"content": "x"}}},
            {"eos_token": ["</s>"]},
        ],
    )
    def test_damaged_settings_are_refused(self, tmp_path, tokenizer, settings):
        write_tokenizer(tokenizer, tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
            Tokenizer(tmp_path / "tokenizer.json" if "eos_token" in settings else tmp_path / "tokenizer.model")


def test_settings_about_tokens_survive_and_those_about_code_do_not(tmp_path, tokenizer):
    (tmp_path / "a").mkdir()
    write_tokenizer(tokenizer, tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    kept = {"pad_token": "</s>", "model_max_length": 2048, "padding_side": "left"}
    lost = {"auto_map": {"AutoTokenizer": "x.py"}, "tokenizer_class": "Strange", "mask_token": "<none>"}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({**settings, **kept, **lost}))
    (tmp_path / "b").mkdir()
    write_tokenizer(Tokenizer(tmp_path / "a" / "tokenizer.model"), tmp_path / "b")
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert {name: written.get(name) for name in kept} == kept
    assert written == {**settings, **kept}


def test_convert_says_that_there_is_no_tokenizer_json(tmp_path, tiny_folder, unigram):
    place = shutil.copytree(tiny_folder, tmp_path / "source")
    shutil.copyfile(unigram, place / "tokenizer.model")
    assert any("tokenizer.json is not written" in text for text in convert(place, tmp_path / "a").warnings)
    assert convert(tiny_folder, tmp_path / "b").warnings == ()


def test_bos_is_added_where_the_files_say_so(tmp_path, tokenizer):
    """Other programs read it from the post-processor, so the written file agrees with the settings."""
    from tokenizers import Tokenizer as Package

    for said, expected in ((True, True), (False, False), (None, True)):
        place = tmp_path / str(said)
        place.mkdir()
        write_tokenizer(tokenizer, place)
        (place / "tokenizer.model").unlink()
        settings = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": said}))
        found = Tokenizer(place / "tokenizer.json")
        write_tokenizer(found, place)
        assert found.adds_bos == expected
        assert found.encode("a fox") == Package.from_file(str(place / "tokenizer.json")).encode("a fox").ids
        assert (found.encode("a fox")[0] == 1) == expected
