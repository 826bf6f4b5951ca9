"""From documents to token files on disk, and from token files to the rows of any step.

A corpus is tokenized once into a flat file of ids per source, with an index of its documents. The rows of a step then
depend only on the seed and the step, so a run sees the same rows if it is resumed or split over several processes.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, one_line
from ..files.output import output_folder
from ..files.paths import check_regular, exists, open_regular
from ..tokenizer.tokenizer import Tokenizer
from .batch import TokenBatch, target_mask
from .text_files import TextSource, read_documents

PACKINGS = ("stream", "documents", "rows")
_SPLITS = ("train", "validation")
_HASH_STEPS = 1 << 32
_BLOCK = 4096  # rows whose sources are worked out at once
_END_BYTES = 1 << 16


@dataclass(frozen=True)
class Filters:
    """Which documents are skipped or held out; CoreNet's recipe requires 200 characters and 256 tokens."""

    min_characters: int = 0
    min_tokens: int = 0
    validation_share: float = 0.02  # of the documents, chosen by a hash of their text


class TokenizedDataset:
    """Documents as ids on disk, each from BOS to EOS.

    Raises:
        DataError: if the files are damaged, as far as their sizes and offsets tell; ids are checked when they are read.
    """

    def __init__(self, stem: Path, dtype: np.dtype, vocab_size: int):
        self._stem = stem
        self._vocab_size = vocab_size
        try:
            for suffix in (".offsets.npy", ".tokens"):
                check_regular(stem.with_suffix(suffix), DataError)
            # (documents + 1,)
            self.offsets = np.lib.format.open_memmap(stem.with_suffix(".offsets.npy"), "r")
            size = stem.with_suffix(".tokens").stat().st_size // dtype.itemsize
            self.tokens = (
                np.memmap(stem.with_suffix(".tokens"), dtype, "r", shape=(size,)) if size else np.zeros(0, dtype)
            )
        except Exception as error:  # NumPy evaluates the header, which raises errors of many kinds
            raise self._damaged(one_line(error, 100)) from error
        offsets = self.offsets
        is_list = offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) > 0
        if not is_list or offsets[0] != 0 or np.diff(offsets).min(initial=0) < 0:
            raise self._damaged("its offsets do not ascend from 0")
        if int(offsets[-1]) * dtype.itemsize != stem.with_suffix(".tokens").stat().st_size:
            raise self._damaged(f"{stem.name}.tokens has another size than its offsets say")

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents."""
        return len(self.tokens)

    def checked(self, ids: np.ndarray) -> np.ndarray:
        """The same ids, which must be in the vocabulary.

        Raises:
            DataError: if one is not.
        """
        if ids.max(initial=0) >= self._vocab_size:
            raise self._damaged(f"it contains the id {ids.max()}, but the vocabulary has {self._vocab_size:,} tokens")
        return ids

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self._stem.parent} is damaged ({reason}); delete this folder, and it is made again")

    def document(self, number: int) -> np.ndarray:
        """Ids of one document, (T,)."""
        return self.tokens[int(self.offsets[number]) : int(self.offsets[number + 1])]


@dataclass(frozen=True)
class Corpus:
    """Token files of all sources, for training and for validation."""

    train: tuple[TokenizedDataset, ...]
    validation: tuple[TokenizedDataset, ...]
    weights: tuple[float, ...]
    fingerprint: str  # hash of the files, the tokenizer and the filters

    @property
    def num_tokens(self) -> int:
        """Tokens to train on, of all sources."""
        return sum(file.num_tokens for file in self.train)

    @property
    def num_documents(self) -> int:
        """Documents to train on, of all sources."""
        return sum(file.num_documents for file in self.train)


def prepare_corpus(
    sources: Sequence[TextSource],
    tokenizer: Tokenizer,
    filters: Filters,
    cache: Path,
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> Corpus:
    """Tokenize the sources into `cache`, or reuse the token files of an earlier run.

    Args:
        on_progress: called with the bytes of the files read so far, and of all files.
    Raises:
        DataError: if a source is missing or broken, or the filters remove all of its text.
    """
    if not sources:
        raise DataError("no data given")
    files = [source.files() for source in sources]
    fingerprint = _fingerprint(sources, files, tokenizer, filters)
    folder = cache / fingerprint[:16]
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    if not exists(folder):
        total = sum(path.stat().st_size for paths in files for path in paths)
        done = 0
        with output_folder(folder) as output, output.replaced(durable=True) as staging:
            for number, (source, paths) in enumerate(zip(sources, files, strict=True)):
                with ExitStack() as open_files:
                    writers = {
                        split: open_files.enter_context(_Writer(staging / f"{number}-{split}", dtype))
                        for split in _SPLITS
                    }
                    for path in paths:
                        for text in read_documents(path, source.text_key):
                            ids = _ids(text, tokenizer, filters)
                            if ids is not None:
                                writers[_split(text, filters)].add(ids)
                        done += path.stat().st_size
                        on_progress(done, total)
    opened = {
        split: tuple(
            TokenizedDataset(folder / f"{number}-{split}", dtype, tokenizer.vocab_size)
            for number in range(len(sources))
        )
        for split in _SPLITS
    }
    for source, tokens in zip(sources, opened["train"], strict=True):
        if tokens.num_documents == 0:
            raise DataError(f"{source.path} has no text left after the filters")
    return Corpus(opened["train"], opened["validation"], tuple(source.weight for source in sources), fingerprint)


class _Writer:
    def __init__(self, stem: Path, dtype: np.dtype):
        self._stem = stem
        self._dtype = dtype
        self._offsets = [0]
        self._file = open(stem.with_suffix(".tokens"), "wb")  # noqa: SIM115, closed by `__exit__`

    def __enter__(self) -> "_Writer":
        return self

    def add(self, ids: list[int]) -> None:
        self._file.write(np.array(ids, self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))

    def __exit__(self, *_: object) -> None:
        self._file.close()
        np.save(self._stem.with_suffix(".offsets.npy"), np.array(self._offsets, np.int64))


def _ids(text: str, tokenizer: Tokenizer, filters: Filters) -> list[int] | None:
    if not text.strip() or len(text) < filters.min_characters:
        return None
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    return ids if len(ids) >= filters.min_tokens else None


def _split(text: str, filters: Filters) -> str:
    """The split of a document, by a hash of its text, so that copies of a document are in the same split."""
    return "validation" if zlib.crc32(text.encode()) < filters.validation_share * _HASH_STEPS else "train"


def _fingerprint(sources: Sequence[TextSource], files: list[list[Path]], tokenizer: Tokenizer, filters: Filters) -> str:
    about: dict[str, Any] = {
        "files": [[[path.name, path.stat().st_size, _ends(path)] for path in paths] for paths in files],
        "text_keys": [source.text_key for source in sources],
        "vocabulary": tokenizer.vocab_hash(),
        "filters": asdict(filters),
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _ends(path: Path) -> str:
    """A hash of the beginning and end of a file; with its size, enough to detect a change."""
    with open_regular(path) as file:
        head = file.read(_END_BYTES)
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        return hashlib.sha256(head + file.read()).hexdigest()


class CorpusBatches:
    """The rows of every step of a run."""

    def __init__(self, corpus: Corpus, batch_size: int, sequence_length: int, packing: str, seed: int):
        assert packing in PACKINGS, f"unknown packing {packing}"
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self._packing = packing
        self._seed = seed
        self._files = corpus.train
        sizes = [
            weight * (file.num_documents if packing == "rows" else file.num_tokens)
            for weight, file in zip(corpus.weights, self._files, strict=True)
        ]
        self._turns = _Turns(sizes)

    def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
        """Rows `first` to `first + count` (exclusive) of a step's `batch_size`; each process takes its own rows."""
        numbers = range(step * self.batch_size + first, step * self.batch_size + first + (count or self.batch_size))
        tokens, segments = (np.stack(parts) for parts in zip(*map(self._row, numbers), strict=True))
        isolated = self._packing == "documents"
        return TokenBatch(tokens, segments, target_mask(segments, isolated), isolated)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Row by number: the number of earlier rows from its source selects the position."""
        source, earlier = self._turns(number)
        return _row(self._files[source], earlier, self.sequence_length, self._packing, self._seed)


class _Turns:
    """From which source each row comes, and how many rows from it come before.

    Whole blocks of rows are worked out at once, because a GPU takes a step in less time than a loop over rows.
    """

    def __init__(self, sizes: Sequence[float]):
        self._ends = np.cumsum(sizes) / sum(sizes)  # cumulative shares of the sources
        self._before = [np.zeros(len(sizes), np.int64)]  # rows of each source before each block
        self._block: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __call__(self, number: int) -> tuple[int, int]:
        """The source of a row, and the number of earlier rows from this source."""
        block, place = divmod(number, _BLOCK)
        if self._block[0] != block:
            self._block = (block, self._sources(block))
        sources = self._block[1]
        while len(self._before) <= block:
            earlier = self._sources(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(earlier, minlength=len(self._ends)))
        source = int(sources[place])
        return source, int(self._before[block][source]) + int(np.count_nonzero(sources[:place] == source))

    def _sources(self, block: int) -> np.ndarray:
        """The source of every row of a block: int64 (_BLOCK,)."""
        numbers = np.arange(block * _BLOCK, (block + 1) * _BLOCK)
        return np.searchsorted(self._ends, _spread(numbers), side="right").clip(max=len(self._ends) - 1)


def validation_rows(
    corpus: Corpus, sequence_length: int, limit: int, first: int = 0, stride: int = 1, isolated: bool = False
) -> Iterator[TokenBatch]:
    """Held-out documents of all sources, concatenated, in rows that overlap by one token.

    Args:
        limit: maximum number of rows, which are spread evenly over all sources; 0: all.
        first, stride: yield every `stride`-th of these rows, starting with row `first`, for one of several processes.
        isolated: whether documents in the same row do not attend to one another.
    """
    places = [
        (file, start) for file in corpus.validation for start in range(0, max(0, file.num_tokens - 1), sequence_length)
    ]
    count = min(limit or len(places), len(places))
    for number in range(first, count, stride):
        file, start = places[number * len(places) // count]
        tokens, segments = _cut(file, None, start, sequence_length)
        yield TokenBatch(tokens[None], segments[None], target_mask(segments[None], isolated), isolated)


def _spread(number: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), multiples of the golden ratio; any run of them is spread evenly."""
    return (number * 0.6180339887498949 + 0.5) % 1.0


def _row(file: TokenizedDataset, number: int, length: int, packing: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if packing == "rows":
        epoch, place = divmod(number, file.num_documents)
        document = file.document(int(_order(file, seed, epoch)[0][place]))[: length + 1]
        document = file.checked(document).astype(np.int32)
        padding = length + 1 - len(document)
        segments = np.zeros(length + 1, np.int32)
        segments[len(document) :] = -1
        return np.pad(document, (0, padding)), segments
    per_epoch = max(1, (file.num_tokens - 1) // length)
    epoch, place = divmod(number, per_epoch)
    shift = np.random.default_rng([seed, epoch, 1]).integers(length) if per_epoch > 1 else 0
    return _cut(file, _order(file, seed, epoch), int((place * length + shift) % file.num_tokens), length)


@lru_cache(maxsize=8)
def _order(file: TokenizedDataset, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """An order of the documents, (D,), and where each begins in it, with the end, (D + 1,)."""
    order = np.random.default_rng([seed, epoch]).permutation(file.num_documents)
    lengths = np.diff(file.offsets)[order]
    return order, np.concatenate([[0], np.cumsum(lengths)])


def _cut(
    file: TokenizedDataset, order: tuple[np.ndarray, np.ndarray] | None, start: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """`length` + 1 tokens of the concatenated documents from `start` on, and their segments, int32 (length + 1,).

    With an `order`, the first document follows the last; without one, the row is padded after the last document.
    """
    documents, begins = order if order is not None else (np.arange(file.num_documents), np.asarray(file.offsets))
    tokens = np.zeros(length + 1, np.int32)
    segments = np.full(length + 1, -1, np.int32)
    place = int(np.searchsorted(begins, start, side="right")) - 1
    filled = 0
    skip = start - int(begins[place])
    segment = 0
    while filled <= length:
        if place == len(documents):
            if order is None:  # validation ends with the last document
                break
            place = 0
        ids = file.document(int(documents[place]))[skip : skip + length + 1 - filled]
        tokens[filled : filled + len(ids)] = file.checked(ids)
        segments[filled : filled + len(ids)] = segment
        filled += len(ids)
        segment += 1
        place += 1
        skip = 0
    return tokens, segments
