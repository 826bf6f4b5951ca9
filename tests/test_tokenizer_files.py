import json

import pytest

from mlx_openelm import Tokenizer
from mlx_openelm.errors import SourceError, TokenizerError
from mlx_openelm.tokenizer import files as tokenizer_files
from mlx_openelm.tokenizer.files import LLAMA_REPO, PUBLIC_COPIES, find_tokenizer, has_tokenizer, write_tokenizer


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


def test_what_was_asked_for_comes_first(tmp_path, tokenizer_path):
    found, origin = find_tokenizer(str(tokenizer_path), tmp_path, 400, chat=True)
    assert (found.vocab_size, origin, found.has_chat_template) == (400, "tokenizer.model", True)


def test_the_models_own_comes_next(offline, tiny_folder):
    found, origin = find_tokenizer(None, tiny_folder, 400, chat=False)
    assert found.path == tiny_folder / "tokenizer.model"
    assert origin == "the model's own"


def test_then_the_cache_then_the_hub_then_public_copies(offline, llama, tmp_path):
    cache, hub = offline
    hub[PUBLIC_COPIES[1]] = llama
    assert find_tokenizer(None, tmp_path, 400, chat=False)[1] == PUBLIC_COPIES[1]
    hub[LLAMA_REPO] = llama
    assert find_tokenizer(None, tmp_path, 400, chat=False)[1] == LLAMA_REPO
    cache[PUBLIC_COPIES[0]] = llama
    assert find_tokenizer(None, tmp_path, 400, chat=False)[1] == f"{PUBLIC_COPIES[0]}, from the Hugging Face cache"


def test_copies_with_another_vocabulary_are_not_believed(offline, monkeypatch, tokenizer_path, tmp_path):
    monkeypatch.setattr(tokenizer_files, "LLAMA_VOCAB_SIZE", 400)
    _, hub = offline
    hub[PUBLIC_COPIES[0]] = tokenizer_path
    with pytest.raises(TokenizerError, match=rf"{PUBLIC_COPIES[0]} \(its vocabulary is not Llama's\)"):
        find_tokenizer(None, tmp_path, 400, chat=False)


def test_failure_names_every_place_and_three_ways_out(offline, tmp_path):
    with pytest.raises(TokenizerError) as caught:
        find_tokenizer(None, tmp_path, 32000, chat=False)
    message = str(caught.value)
    for place in (str(tmp_path), "cache", LLAMA_REPO, *PUBLIC_COPIES):
        assert place in message
    for way in ("Set `tokenizer` to a file", "hf auth login", "`tokenizer=none`"):
        assert way in message
    assert "\n" not in message


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer_path):
    with pytest.raises(TokenizerError, match="400 tokens, but the model has only 399"):
        find_tokenizer(str(tokenizer_path), None, 399, chat=False)


def test_a_folder_without_one_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        find_tokenizer(str(tmp_path), None, 400, chat=False)
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
    assert rendered == chat_tokenizer.render_chat(messages)
    assert other.encode(rendered) == chat_tokenizer.encode_chat(messages)


def test_other_algorithms_are_written_as_they_are(tmp_path, tokenizer_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(tokenizer_path.with_name("text.txt")),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=330,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "out").mkdir()
    write_tokenizer(Tokenizer(tmp_path / "unigram.model"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
