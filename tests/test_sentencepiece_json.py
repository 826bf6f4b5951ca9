import json

import pytest

from conftest import train_sentencepiece
from mlx_openelm import Tokenizer
from mlx_openelm.tokenizer.libraries import SentencePiece, Tokenizers
from mlx_openelm.tokenizer.sentencepiece_json import same_ids, tokenizer_json

TEXT = "once upon a time there was a small fox who met a wolf and they were friends ever after\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a BPE model with other options; returns its path."""

    def train(**options):
        folder = tmp_path_factory.mktemp("trained")
        return train_sentencepiece(folder, TEXT * 50, vocab_size=330, hard_vocab_limit=False, **options)

    return train


def with_pieces_of_spaces(path):
    """Pieces of spaces alone get the score of Llama's, -1e9, and stay where they are."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    model.ParseFromString(path.read_bytes())
    for number, piece in enumerate(model.pieces):
        if 259 <= number < 259 + 15:
            piece.piece, piece.score, piece.type = "▁" * (number - 257), -1e9, 1
    path.write_bytes(model.SerializeToString())
    return path


def test_scores_and_not_ids_give_the_order_of_merges(trained):
    """In Llama's vocabulary, pieces of spaces come first by id, and last by score."""
    path = with_pieces_of_spaces(trained())
    source = SentencePiece(path)
    derived = Tokenizers(path, content=tokenizer_json(source))
    assert same_ids(source, derived)
    for text in (" " * 40, "a  b", "  a", "once   upon    a     time      there"):
        assert derived.encode(text) == source.encode(text)
    assert 259 in source.encode("a  b")


def test_a_vocabulary_without_a_leading_space(trained):
    path = trained(add_dummy_prefix=False)
    source = SentencePiece(path)
    derived = Tokenizers(path, content=tokenizer_json(source))
    assert same_ids(source, derived)
    assert Tokenizer(path).decode(source.encode("a fox")) == "a fox"


def test_what_is_not_plain_bpe_is_found_out(trained):
    for options in ({"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc_cf"}):
        path = trained(**options)
        source = SentencePiece(path)
        assert not same_ids(source, Tokenizers(path, content=tokenizer_json(source)))


def test_control_and_unknown_tokens_are_special(trained):
    source = SentencePiece(trained(control_symbols=["<|sep|>"], pad_id=3))
    added = {entry["content"]: entry for entry in json.loads(tokenizer_json(source))["added_tokens"]}
    assert set(added) == {"<unk>", "<s>", "</s>", "<pad>", "<|sep|>"}
    assert all(entry["special"] for entry in added.values())
