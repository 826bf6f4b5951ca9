"""Examples for tuning, from a file of records or a folder with training, validation and test files."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, TokenizerError
from ..files.paths import is_file, is_folder
from ..tokenizer.tokenizer import Tokenizer
from .formats import FIELD_NAMES, Example, PreferencePair, encode_record, format_of
from .json_records import BrokenLines
from .record_files import RECORD_ENDINGS, read_records

TOO_LONG = ("cut", "drop")
TRAIN_ON = ("completion", "all")
_TRAIN, _VALIDATION, _TEST = ("train",), ("valid", "validation", "val", "dev"), ("test",)


@dataclass(frozen=True)
class ExampleOptions:
    """How records become examples.

    Attributes:
        max_length: maximum tokens of an example, including BOS and EOS.
        max_prompt: maximum tokens before the first answer; longer prompts lose their beginning; 0: no limit.
        too_long: "cut" or "drop" longer examples.
        train_on: "completion", or "all" tokens after BOS; pairs always train on the answers.
        columns: field names in the file, such as {"prompt": "question"}.
        indent: spaces before an instruction's lines; see `instruction_prompt`.
    Raises:
        DataError: if `columns` names a field that no format has.
    """

    max_length: int = 1024
    max_prompt: int = 0
    too_long: str = "cut"
    train_on: str = "completion"
    columns: Mapping[str, str] = field(default_factory=dict)
    indent: int = 0

    def __post_init__(self) -> None:
        assert self.max_length > 1, "max_length must be at least 2"
        assert self.max_prompt >= 0, "max_prompt must not be negative"
        assert self.too_long in TOO_LONG, f"unknown too_long {self.too_long}"
        assert self.train_on in TRAIN_ON, f"unknown train_on {self.train_on}"
        for name in self.columns:
            if name not in FIELD_NAMES:
                raise DataError(f"unknown field {name!r} (choose from {', '.join(sorted(FIELD_NAMES))})")


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """Examples of one format, and how many records of their file were cut, dropped or broken."""

    format: str
    examples: tuple[Example, ...] | tuple[PreferencePair, ...]
    path: Path
    num_cut: int = 0
    num_dropped: int = 0  # too long, without an answer, or pairs with equal answers
    num_broken: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the format, the ids and the completion masks, in order."""
        digest = hashlib.sha256(self.format.encode())
        for example in self.examples:
            digest.update(_content(example))
        return digest.hexdigest()


def read_examples(
    path: Path,
    tokenizer: Tokenizer,
    options: ExampleOptions = ExampleOptions(),
) -> ExampleSet:
    """Examples from all records of a file, which must have the same format.

    Raises:
        DataError: naming the file and the record, if the file cannot be read, a record is invalid, or no example is
            left.
    """
    broken = BrokenLines(path)
    wanted = {*FIELD_NAMES, *options.columns.values()}
    format_name = ""
    examples: list[Any] = []
    num_cut = num_dropped = 0
    for number, record in enumerate(read_records(path, broken, wanted), start=1):
        try:
            fields = _fields(record, options.columns)
            found = format_of(fields, options.columns)
            if format_name and found != format_name:
                raise DataError(f"{found} format, but earlier records are in {format_name} format")
            format_name = found
            whole = encode_record(format_name, fields, tokenizer, indent=options.indent)
        except (DataError, TokenizerError) as error:
            raise DataError(f"{path}, record {number + broken.count}: {error}") from error
        example = _fitted(whole, options)
        too_long = max(len(sequence.tokens) for sequence in whole.sequences) > options.max_length
        if not _teaches(whole) or not _teaches(example) or (too_long and options.too_long == "drop"):
            num_dropped += 1
        else:
            num_cut += too_long
            examples.append(example)
    if not examples:
        reasons = (
            [f"{num_dropped:,} are too long, have no answer, or are pairs with equal answers"] if num_dropped else []
        )
        reasons += [f"broken: {broken.first}"] if broken.count else []
        raise DataError(f"{path} contains no example to train on" + (f": {'; '.join(reasons)}" if reasons else ""))
    return ExampleSet(format_name, tuple(examples), path, num_cut, num_dropped, broken.count)


def _fields(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a record under the formats' names, without nulls."""
    for column in columns.values():
        if column not in record:
            raise DataError(f"no column {column!r}; the columns are {', '.join(map(str, record))}")
    others = {name: value for name, value in record.items() if name not in columns.values()}
    ours = {name: record[column] for name, column in columns.items()}
    return {name: value for name, value in {**others, **ours}.items() if value is not None}


def _fitted(example: Example | PreferencePair, options: ExampleOptions) -> Example | PreferencePair:
    if isinstance(example, PreferencePair):
        return PreferencePair(
            *(_cut(_shortened(sequence, options.max_prompt), options.max_length) for sequence in example.sequences)
        )
    example = _shortened(example, options.max_prompt)
    if options.train_on == "all":
        example = Example(example.tokens, np.arange(len(example.tokens)) > 0)
    return _cut(example, options.max_length)


def _shortened(example: Example, max_prompt: int) -> Example:
    """The example with its prompt reduced to BOS and the last `max_prompt` tokens."""
    excess = int(np.argmax(example.completion_mask)) - max_prompt
    if not max_prompt or excess <= 0:
        return example
    kept = np.r_[0, excess + 1 : len(example.tokens)]
    return Example(example.tokens[kept], example.completion_mask[kept])


def _cut(example: Example, length: int) -> Example:
    return Example(example.tokens[:length], example.completion_mask[:length])


def _teaches(example: Example | PreferencePair) -> bool:
    """Whether an example has an answer to train on; a pair needs two different ones."""
    if isinstance(example, PreferencePair) and np.array_equal(example.chosen.tokens, example.rejected.tokens):
        return False
    return all(sequence.completion_mask.any() for sequence in example.sequences)


def _content(example: Example | PreferencePair) -> bytes:
    """Bytes that are equal for equal examples."""
    return b"".join(
        len(sequence.tokens).to_bytes(4, "little") + sequence.tokens.tobytes() + sequence.completion_mask.tobytes()
        for sequence in example.sequences
    )


def read_splits(
    path: Path,
    tokenizer: Tokenizer,
    options: ExampleOptions = ExampleOptions(),
    validation: str | Path | float | None = None,
    seed: int = 0,
) -> tuple[ExampleSet, ExampleSet | None, ExampleSet | None]:
    """Training, validation and test examples.

    Args:
        path: a file, or a folder with files named train, valid (or validation, val, dev) and test.
        validation: a file, or the share of the training examples to hold out (equal examples stay together);
            replaces the folder's validation file.
        seed: selects which examples are held out.
    Raises:
        DataError: as for `read_examples`; if there is nothing to train on, or the formats differ.
    """
    train_path: Path | None = path
    valid_path = test_path = None
    if is_folder(path):
        train_path, valid_path, test_path = (_split_file(path, names) for names in (_TRAIN, _VALIDATION, _TEST))
    if train_path is None:
        raise DataError(f"{path} contains no training file; expected train.jsonl, .json, .csv or .parquet")
    if isinstance(validation, str | Path):
        valid_path, validation = Path(validation), None
    elif validation is not None:
        valid_path = None
    train = read_examples(train_path, tokenizer, options)
    valid, test = (read_examples(other, tokenizer, options) if other else None for other in (valid_path, test_path))
    for held_out in (valid, test):
        if held_out is not None and held_out.format != train.format:
            raise DataError(f"{held_out.path} has {held_out.format} format, but {train.path} has {train.format} format")
    if validation is not None:
        train, valid = _held_out(train, validation, seed)
    return train, valid, test


def _split_file(folder: Path, names: Sequence[str]) -> Path | None:
    found = [path for name in names for ending in RECORD_ENDINGS if is_file(path := folder / f"{name}{ending}")]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name} both exist; remove one of them")
    return found[0] if found else None


def _held_out(examples: ExampleSet, share: float, seed: int) -> tuple[ExampleSet, ExampleSet]:
    """Training examples and held-out ones, which are those with the smallest hashes, at least one."""
    if not 0 < share < 1:
        raise DataError(f"the validation share must be above 0 and below 1; got {share}")
    hashes = [zlib.crc32(_content(example), seed) for example in examples.examples]
    largest = sorted(hashes)[max(1, round(share * len(hashes))) - 1]
    parts: tuple[list[Any], list[Any]] = ([], [])
    for example, value in zip(examples.examples, hashes, strict=True):
        parts[value <= largest].append(example)
    if not parts[0]:
        raise DataError(f"{examples.path} has no example left to train on if a share of {share} is held out")
    return replace(examples, examples=tuple(parts[0])), ExampleSet(examples.format, tuple(parts[1]), examples.path)


def marked(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """An example's text as stretches (text, is_answer); joined, the texts equal the decoded ids."""
    decoder = tokenizer.stream_decoder()
    stretches: list[tuple[str, bool]] = []
    for is_answer, run in groupby(
        zip(example.tokens.tolist(), example.completion_mask.tolist(), strict=True), lambda pair: pair[1]
    ):
        stretches.append(("".join(decoder.push(token) for token, _ in run), is_answer))
    stretches[-1] = (stretches[-1][0] + decoder.finish(), stretches[-1][1])
    stretches = [(text, is_answer) for text, is_answer in stretches if text]
    if not stretches:
        return []
    # The stream decoder keeps the leading space that `encode` added; `decode` removes it.
    surplus = sum(len(text) for text, _ in stretches) - len(tokenizer.decode(example.tokens.tolist()))
    return [(stretches[0][0][surplus:], stretches[0][1]), *stretches[1:]]
