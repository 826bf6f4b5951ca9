from itertools import pairwise

import numpy as np
import pytest

from mlx_openelm.data.corpus import CorpusBatches, Filters, prepare_corpus, validation_rows
from mlx_openelm.data.text_files import TextSource
from mlx_openelm.errors import DataError


def write(path, documents):
    path.write_text("\n<|endoftext|>\n".join(documents))
    return TextSource(str(path))


@pytest.fixture
def corpus(tmp_path, tokenizer):
    documents = [f"Document {n} tells of a fox {'and a river ' * (n % 7)}and ends." for n in range(200)]
    return prepare_corpus([write(tmp_path / "a.txt", documents)], tokenizer, Filters(), tmp_path / "cache")


def test_documents_stand_between_bos_and_eos(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", ["One fox.", "  ", "Two foxes."])
    corpus = prepare_corpus([source], tokenizer, Filters(validation_share=0), tmp_path / "cache")
    (file,) = corpus.train
    assert [file.document(n).tolist() for n in range(2)] == [
        [*tokenizer.encode(text), tokenizer.eos_token_id] for text in ("One fox.", "Two foxes.")
    ]
    assert file.num_documents == 2  # the empty one is left out


def test_the_same_corpus_is_tokenized_once(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", ["One fox.", "Two foxes."])
    calls = []
    for _ in range(2):
        corpus = prepare_corpus([source], tokenizer, Filters(), tmp_path / "cache", lambda *done: calls.append(done))
    assert len(calls) == 1
    write(tmp_path / "a.txt", ["One fox.", "Three foxes."])
    assert prepare_corpus([source], tokenizer, Filters(), tmp_path / "cache").fingerprint != corpus.fingerprint


def test_filters_and_what_they_leave(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", ["short", "this one is long enough for the filter"])
    corpus = prepare_corpus([source], tokenizer, Filters(min_characters=20, validation_share=0), tmp_path / "cache")
    assert corpus.train[0].num_documents == 1
    with pytest.raises(DataError, match="has no text left"):
        prepare_corpus([source], tokenizer, Filters(min_tokens=1000), tmp_path / "cache")
    with pytest.raises(DataError, match="no data"):
        prepare_corpus([], tokenizer, Filters(), tmp_path / "cache")


def test_held_out_documents_are_not_trained_on(tmp_path, tokenizer):
    documents = [f"Story number {n} about a fox." for n in range(1000)]
    source = write(tmp_path / "a.txt", [*documents, *documents])  # copies stand on the same side
    corpus = prepare_corpus([source], tokenizer, Filters(validation_share=0.1), tmp_path / "cache")
    train, held_out = (
        {file.document(n).tobytes() for n in range(file.num_documents)}
        for file in (corpus.train[0], corpus.validation[0])
    )
    assert not train & held_out
    assert 60 < len(held_out) < 140


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_an_epoch_sees_every_token_once(corpus, packing):
    (file,) = corpus.train
    length = 16
    rows = (file.num_tokens - 1) // length
    batches = CorpusBatches(corpus, rows, length, packing, seed=3)
    seen = np.concatenate([batches.step(epoch).tokens[:, :-1].ravel() for epoch in range(2)])
    every = np.sort(np.asarray(file.tokens))
    for part in np.split(seen, 2):
        missing = len(every) - len(part)  # less than a row does not fit
        assert 0 <= missing <= length
        counts = np.bincount(every, minlength=400) - np.bincount(part, minlength=400)
        assert counts.min() >= 0
        assert counts.sum() == missing
    assert not np.array_equal(*np.split(seen, 2))  # another order


@pytest.mark.parametrize("packing", ["stream", "documents", "rows"])
def test_each_epoch_has_an_order_of_its_own(tmp_path, tokenizer, packing):
    """Which documents follow one another, told by the ends of one and the beginning of the next."""
    source = write(tmp_path / "a.txt", [f"{n} fox {n}" for n in range(40)])
    corpus = prepare_corpus([source], tokenizer, Filters(validation_share=0), tmp_path / "cache")
    (file,) = corpus.train
    per_epoch = file.num_documents if packing == "rows" else (file.num_tokens - 1) // 16
    batches = CorpusBatches(corpus, per_epoch, 16, packing, seed=0)

    def neighbours(epoch):
        rows = batches.step(epoch)
        if packing == "rows":
            starts = [row[:5].tobytes() for row in rows.tokens]
            assert len(set(starts)) == file.num_documents
            return set(pairwise(starts))
        ends = [(row, int(place)) for row in rows.tokens for place in np.flatnonzero(row[4:12] == 1) + 4]
        return {row[place - 4 : place + 5].tobytes() for row, place in ends}

    first, again, second = neighbours(0), neighbours(0), neighbours(1)
    assert len(first) > 10
    assert first == again
    assert len(first & second) < len(first) / 2


def test_rows_follow_one_another_within_documents(corpus):
    (file,) = corpus.train
    documents = {file.document(n).tobytes() for n in range(file.num_documents)}
    rows = CorpusBatches(corpus, 4, 64, "documents", seed=0).step(5)
    for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
        for segment in range(1, segments.max()):  # those that are whole
            assert tokens[segments == segment].astype(np.uint16).tobytes() in documents


def test_one_document_a_row(corpus):
    batches = CorpusBatches(corpus, 8, 20, "rows", seed=0)
    rows = batches.step(0)
    assert (rows.tokens[:, 0] == 1).all()
    for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
        counted = segments >= 0
        assert counted[: counted.sum()].all()
        assert (tokens[~counted] == 0).all()


def test_processes_share_a_step(corpus):
    batches = CorpusBatches(corpus, 6, 16, "stream", seed=0)
    whole = batches.step(7)
    parts = [batches.step(7, first, 2) for first in (0, 2, 4)]
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)


def test_sources_are_seen_by_their_weights(tmp_path, tokenizer):
    one = write(tmp_path / "a.txt", ["aaa aaa aaa " * 20] * 10)
    other = write(tmp_path / "b.txt", ["zzz zzz zzz " * 20] * 10)
    sources = [TextSource(one.path, weight=3.0), TextSource(other.path, weight=1.0)]
    corpus = prepare_corpus(sources, tokenizer, Filters(validation_share=0), tmp_path / "cache")
    batches = CorpusBatches(corpus, 8, 16, "stream", seed=0)
    letter = tokenizer.encode("aaa", bos=False)[-1]
    share = np.mean([np.mean((batches.step(step).tokens == letter).any(axis=1)) for step in range(50)])
    sizes = [file.num_tokens for file in corpus.train]
    assert share == pytest.approx(3 * sizes[0] / (3 * sizes[0] + sizes[1]), abs=0.01)


def test_rows_of_a_source_come_in_turn_however_late(tmp_path, tokenizer):
    """Numbers beyond the counted blocks: the count before is that of going through them one by one."""
    sources = [write(tmp_path / f"{n}.txt", [f"{n} fox " * 50] * 5) for n in range(3)]
    batches = CorpusBatches(
        prepare_corpus(sources, tokenizer, Filters(validation_share=0), tmp_path / "c"), 1, 8, "stream", 0
    )
    counts = [0, 0, 0]
    for number in range(9000):
        spread = (number * 0.6180339887498949 + 0.5) % 1.0
        source = min(2, int(np.searchsorted(batches._turns._ends, spread, side="right")))
        if number % 1000 == 0:
            assert batches._turns(number) == (source, counts[source])
        counts[source] += 1


def test_validation_goes_through_all_that_is_held_out(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", [f"Story number {n} about a fox." for n in range(300)])
    corpus = prepare_corpus([source], tokenizer, Filters(validation_share=0.2), tmp_path / "cache")
    (file,) = corpus.validation
    rows = list(validation_rows(corpus, 32, 1000))
    predicted = sum(int((row.segments[:, 1:] >= 0).sum()) for row in rows)
    assert predicted == file.num_tokens - 1
    assert len(list(validation_rows(corpus, 32, 3))) == 3


def offsets_descend(tokens, offsets):
    np.save(offsets, np.load(offsets)[::-1].copy())


def offsets_are_floats(tokens, offsets):
    np.save(offsets, np.load(offsets).astype(np.float64))


def offsets_are_text(tokens, offsets):
    offsets.write_text("[0, 1, 2]")


def offsets_are_an_archive(tokens, offsets):
    np.savez(offsets.with_suffix(".npz"), np.load(offsets))
    offsets.with_suffix(".npz").replace(offsets)


def tokens_end_too_soon(tokens, offsets):
    tokens.write_bytes(tokens.read_bytes()[:-2])


def tokens_are_too_many(tokens, offsets):
    tokens.write_bytes(tokens.read_bytes() + b"\0")


def tokens_are_missing(tokens, offsets):
    tokens.unlink()


def an_id_is_beyond_the_vocabulary(tokens, offsets):
    ids = np.fromfile(tokens, np.uint16)
    ids[len(ids) // 2 :] = 400
    ids.tofile(tokens)


@pytest.mark.parametrize(
    "damage",
    [offsets_descend, offsets_are_floats, offsets_are_text, offsets_are_an_archive, tokens_end_too_soon,
     tokens_are_too_many, tokens_are_missing, an_id_is_beyond_the_vocabulary],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["stream", "rows"])
def test_damaged_token_files_are_refused(tmp_path, tokenizer, corpus, damage, packing):
    (tokens,) = (tmp_path / "cache").glob("*/0-train.tokens")
    damage(tokens, tokens.with_suffix(".offsets.npy"))
    with pytest.raises(DataError, match=r"is damaged \(.*\); delete this folder"):
        again = prepare_corpus([TextSource(str(tmp_path / "a.txt"))], tokenizer, Filters(), tmp_path / "cache")
        batches = CorpusBatches(again, 50, 16, packing, 0)
        for step in range(4):
            batches.step(step)
