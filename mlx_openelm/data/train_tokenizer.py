"""Trains a tokenizer: SentencePiece BPE with byte fallback, built like Llama's."""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DataError, TokenizerError, one_line
from ..files.output import output_file
from ..tokenizer.tokenizer import Tokenizer
from .text_files import TextSource, read_documents

_LONGEST_SENTENCE = 4000  # bytes; SentencePiece skips longer ones


def train_tokenizer(
    sources: Sequence[TextSource], size: int, path: Path, *, sample_bytes: int = 50_000_000, seed: int = 0
) -> Tokenizer:
    """Train a `tokenizer.model` with `size` tokens on a sample of the documents, and write it to `path`.

    The sample has a share of each source according to its weight. Spaces, control tokens and the order of tokens are as
    in Llama's vocabulary: no normalisation except NFC, a leading space, single digits, unknown characters as bytes.

    Raises:
        DataError: if the data contains no text.
        TokenizerError: if the text does not suffice for `size` tokens.
        OutputError: if `path` exists or cannot be written.
    """
    import sentencepiece

    lines = list(_sample(sources, sample_bytes, seed))
    if not lines:
        raise DataError("the data contains no text to train a tokenizer on")
    with output_file(path) as output, output.replaced() as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=file,
                vocab_size=size,
                model_type="bpe",
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                character_coverage=0.9999,
                max_sentence_length=_LONGEST_SENTENCE,
                num_threads=1,  # with several, the result would not be reproducible
                minloglevel=2,
            )
        except RuntimeError as error:
            raise TokenizerError(f"cannot train a tokenizer with {size:,} tokens: {_reason(error)}") from error
    return Tokenizer(path)


def _reason(error: RuntimeError) -> str:
    if found := re.search(r"Vocabulary size.*too high.*<= (\d+)", str(error)):
        return (
            f"the text suffices for {int(found[1]):,}; use more text, or `train_tokenizer={found[1]}`, which leaves "
            "the rest of the model's vocabulary unused"
        )
    return one_line(error)


def _sample(sources: Sequence[TextSource], sample_bytes: int, seed: int) -> Iterator[str]:
    """Lines of randomly chosen documents: of each source a share by its weight, in total about `sample_bytes`."""
    import unicodedata

    largest = max(source.weight for source in sources)
    files = [(path, source.text_key, source.weight / largest) for source in sources for path in source.files()]
    expected_bytes = sum(path.stat().st_size * share for path, _, share in files)
    part = min(1.0, sample_bytes / max(1, expected_bytes))
    chance = random.Random(seed)
    for path, text_key, share in files:
        for text in read_documents(path, text_key):
            if chance.random() < part * share:
                for line in unicodedata.normalize("NFC", text).split("\n"):
                    if line.strip():
                        yield line
