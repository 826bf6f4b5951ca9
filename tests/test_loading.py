import mlx.core as mx
import pytest

from mlx_openelm import OpenELM, Tokenizer, hub, load, load_model
from mlx_openelm.errors import SourceError


@pytest.fixture
def asked_for(monkeypatch, tiny_folder):
    """A hub that gives one folder for every repository, and remembers which revisions were asked for."""
    asked = []

    def download(repo_id, revision):
        asked.append((repo_id, revision))
        return tiny_folder

    monkeypatch.setattr(hub, "_download", download)
    return asked


def test_a_revision_is_asked_for_of_the_model_and_of_a_tokenizer_by_name(asked_for):
    load("some/model", revision="v1")
    load("some/model", tokenizer="some/tokenizer", revision="v2")
    assert asked_for == [("some/model", "v1"), ("some/model", "v2"), ("some/tokenizer", "v2")]


def test_a_model_and_its_tokenizer(tiny_folder):
    model, tokenizer = load(tiny_folder)
    assert isinstance(model, OpenELM)
    assert isinstance(tokenizer, Tokenizer)
    alone = load_model(tiny_folder, dtype=mx.float32)
    tokens = mx.array([tokenizer.encode("the fox")])
    assert mx.array_equal(alone(tokens), load_model(tiny_folder, dtype=mx.float32)(tokens))


def test_a_model_that_is_not_there(tmp_path):
    for loads in (load, load_model):
        with pytest.raises(SourceError, match="does not exist"):
            loads(tmp_path / "nowhere")
