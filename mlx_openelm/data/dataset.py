"""Examples for tuning, from a file of records or a folder with training, validation and test files."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, TokenizerError
from ..files.paths import is_file, is_folder
from ..tokenizer.example_format import FIELD_NAMES, ExampleFormat, format_of
from ..tokenizer.tokenizer import Tokenizer
from .formats import Example, PreferencePair, encode_record, meets_without_space
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
        example_format: names of the fields, and how prompts become text; without `records`, the fields of the file say
            which format it has.
    """

    max_length: int = 1024
    max_prompt: int = 0
    too_long: str = "cut"
    train_on: str = "completion"
    example_format: ExampleFormat = ExampleFormat()  # noqa: RUF009, frozen

    def __post_init__(self) -> None:
        assert self.max_length > 1, "max_length must be at least 2"
        assert self.max_prompt >= 0, "max_prompt must not be negative"
        assert self.too_long in TOO_LONG, f"unknown too_long {self.too_long}"
        assert self.train_on in TRAIN_ON, f"unknown train_on {self.train_on}"


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """Examples of one format, and how many records of their file were cut, left out or broken.

    Attributes:
        example_format: with the format of the records, and the style of their prompts.
        left_out: number of records that became no example, by cause in words.
        num_cut: examples that lost their end.
        longest: tokens of the longest record, before anything was cut.
        num_meeting: records whose prompt and answer meet without a space; see `meets_without_space`.
    """

    example_format: ExampleFormat
    examples: tuple[Example, ...] | tuple[PreferencePair, ...]
    path: Path
    left_out: Mapping[str, int] = field(default_factory=dict)
    num_cut: int = 0
    num_broken: int = 0
    longest: int = 0
    num_meeting: int = 0

    @property
    def format(self) -> str:
        """The format of the records, such as `completion`."""
        return self.example_format.records

    @property
    def num_dropped(self) -> int:
        """Number of records that became no example."""
        return sum(self.left_out.values())

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
    wanted = {*FIELD_NAMES, *options.example_format.columns.values()}
    example_format = options.example_format
    examples: list[Any] = []
    left_out: Counter[str] = Counter()
    num_cut = longest = num_meeting = 0
    for number, record in enumerate(read_records(path, broken, wanted), start=1):
        try:
            fields = options.example_format.fields_of(record)
            example_format = _format_with(fields, example_format)
            whole = encode_record(example_format, fields, tokenizer)
        except (DataError, TokenizerError) as error:
            raise DataError(f"{path}, record {number + broken.count}: {error}") from error
        length = max(len(sequence.tokens) for sequence in whole.sequences)
        longest = max(longest, length)
        example = _fitted(whole, options)
        if cause := _useless(whole, example, length, options):
            left_out[cause] += 1
        else:
            num_cut += length > options.max_length
            num_meeting += meets_without_space(example_format, fields)
            examples.append(example)
    if not examples:
        reasons = [f"{count:,} {cause}" for cause, count in left_out.items()]
        reasons += [f"the longest has {longest:,} tokens"] if longest > options.max_length else []
        reasons += [f"broken: {broken.first}"] if broken.count else []
        raise DataError(f"{path} contains no example to train on" + (f": {'; '.join(reasons)}" if reasons else ""))
    return ExampleSet(example_format, tuple(examples), path, left_out, num_cut, broken.count, longest, num_meeting)


def _format_with(fields: Mapping[str, Any], known: ExampleFormat) -> ExampleFormat:
    """The format of a record's fields, which must be the one already known, if any."""
    found = format_of(fields, known.columns)
    if known.records:
        if found != known.records:
            raise DataError(f"{found} format, but earlier records are in {known.records} format")
        return known
    of_messages = found == "chat" or (found == "preference" and isinstance(fields["chosen"], list))
    return replace(known, records=found, prompt_style="chat" if of_messages else known.prompt_style)


def _useless(
    whole: Example | PreferencePair, example: Example | PreferencePair, length: int, options: ExampleOptions
) -> str:
    """Why nothing can be learned from an example, in words; empty if something can."""
    if not _teaches(whole):
        return "have equal answers" if isinstance(whole, PreferencePair) and _has_answers(whole) else "have no answer"
    if length > options.max_length and options.too_long == "drop":
        return f"are longer than {options.max_length:,} tokens"
    return "" if _teaches(example) else f"have no answer within {options.max_length:,} tokens"


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
    return _has_answers(example)


def _has_answers(example: Example | PreferencePair) -> bool:
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
    test: Path | None = None,
) -> tuple[ExampleSet, ExampleSet | None, ExampleSet | None]:
    """Training, validation and test examples.

    Args:
        path: a file, or a folder with files named train, valid (or validation, val, dev) and test.
        validation: a file, or the share of the training examples to hold out (equal examples stay together);
            replaces the folder's validation file.
        seed: selects which examples are held out.
        test: a file that replaces the folder's test file.
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
    valid, tested = (
        read_examples(other, tokenizer, options) if other else None for other in (valid_path, test or test_path)
    )
    for held_out in (valid, tested):
        if held_out is not None and held_out.format != train.format:
            raise DataError(f"{held_out.path} has {held_out.format} format, but {train.path} has {train.format} format")
    if validation is not None:
        train, valid = _held_out(train, validation, seed)
    return train, valid, tested


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
    return replace(examples, examples=tuple(parts[0])), ExampleSet(
        examples.example_format, tuple(parts[1]), examples.path
    )


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
