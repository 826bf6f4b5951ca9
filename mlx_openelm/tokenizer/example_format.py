"""The format of a model's examples: the fields of their records, and how a prompt becomes the text before an answer.

Tuning follows it, an adapter records it beside its weights, and generation presents prompts in the same way.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import ConfigError, DataError, quoted
from ..files.fields import Fields

# Required and optional fields of each kind of records; the first kind that matches is used.
FIELDS = {
    "preference": (("chosen", "rejected"), ("prompt",)),
    "chat": (("messages",), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
}
FORMATS = tuple(FIELDS)
FIELD_NAMES = frozenset(name for required, optional in FIELDS.values() for name in (*required, *optional))
PROMPT_STYLES = ("plain", "instruction", "chat")
LARGEST_INDENT = 1000
LONGEST_SEPARATOR = 1000
COLUMNS_EXAMPLE = "prompt=question,completion=answer"
_SAVED = "example_format"


@dataclass(frozen=True)
class ExampleFormat:
    """What has to be known of examples to ask a model in the way it was tuned.

    Attributes:
        records: one of `FORMATS`; empty: as the fields of the records say.
        columns: names of fields in the files, such as {"prompt": "question"}.
        prompt_style: `plain` text, an `instruction` in Alpaca's template, or a message in the `chat` template; empty:
            the style that belongs to the records.
        separator: text between a plain prompt and its answer. Spaces at its end belong to the answer, because tokens
            begin with a space and do not end with one.
        indent: spaces before an instruction's lines; see `instruction_prompt`.
    Raises:
        DataError: if `columns` names an unknown field, or another value is invalid.
    """

    records: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt_style: str = ""
    separator: str = ""
    indent: int = 0

    def __post_init__(self) -> None:
        for value, allowed, name in (
            (self.records, FORMATS, "format of records"),
            (self.prompt_style, PROMPT_STYLES, "prompt style"),
        ):
            if value and value not in allowed:
                raise DataError(f"unknown {name} {quoted(value)} (choose from {', '.join(allowed)})")
        for name in self.columns:
            if name not in FIELD_NAMES:
                raise DataError(f"unknown field {name!r} (choose from {', '.join(sorted(FIELD_NAMES))})")
        if not 0 <= self.indent <= LARGEST_INDENT:
            raise DataError(f"indent must be from 0 to {LARGEST_INDENT:,}; got {quoted(self.indent)}")
        if len(self.separator) > LONGEST_SEPARATOR:
            raise DataError(
                f"separator must have at most {LONGEST_SEPARATOR:,} characters; got {len(self.separator):,}"
            )

    @property
    def style(self) -> str:
        """How prompts are presented: `plain`, `instruction` or `chat`."""
        return self.prompt_style or {"instruction": "instruction", "chat": "chat"}.get(self.records, "plain")

    def prompt_text(self, prompt: str, input: str = "") -> str:
        """The text before the answer, in a style other than `chat`."""
        if self.style == "instruction":
            return instruction_prompt(prompt, input, indent=self.indent)
        return question(prompt, input) + self.separator.rstrip(" ")

    def answer_text(self, answer: str) -> str:
        """The text of an answer after `prompt_text`."""
        if self.style == "instruction":
            return " " * self.indent + answer
        return " " * (len(self.separator) - len(self.separator.rstrip(" "))) + answer

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a record under the names in `FIELDS`, without nulls.

        Raises:
            DataError: if a column is missing; the message lists those that exist.
        """
        for column in self.columns.values():
            if column not in record:
                raise DataError(f"no column {column!r}; the columns are {', '.join(map(str, record))}")
        others = {name: value for name, value in record.items() if name not in self.columns.values()}
        ours = {name: record[column] for name, column in self.columns.items()}
        return {name: value for name, value in {**others, **ours}.items() if value is not None}

    def for_record(self, record: Mapping[str, Any]) -> "ExampleFormat":
        """This format with only those of its columns that are in the record; the answer's may be missing."""
        return replace(self, columns={name: column for name, column in self.columns.items() if column in record})

    def to_dict(self) -> dict[str, Any]:
        """All attributes, for JSON, with the style that the records imply."""
        return {**asdict(self), "prompt_style": self.style}


PLAIN_TEXT = ExampleFormat("text")
CHAT = ExampleFormat("chat")


def saved_format(values: Fields) -> ExampleFormat | None:
    """The format in the entry `example_format` of a JSON file, or None without one.

    Raises:
        OpenELMError: of the file's kind, if it is invalid.
    """
    if values.get(_SAVED) is None:
        return None
    saved = values.table(_SAVED)
    columns = saved.table("columns")
    try:
        return ExampleFormat(
            saved.text("records", ""),
            {name: columns.text(name) for name in columns},
            saved.text("prompt_style", ""),
            saved.text("separator", ""),
            saved.whole("indent", 0),
        )
    except DataError as error:
        raise values.error(f"{saved.where}: {error}") from error


def format_entry(example_format: ExampleFormat | None) -> dict[str, Any]:
    """The entry of a JSON file that `saved_format` reads; empty without a format."""
    return {} if example_format is None else {_SAVED: example_format.to_dict()}


def format_of(record: Mapping[str, Any], named: Collection[str] = ()) -> str:
    """The first kind of records whose required fields are all in the record, and which uses all fields in `named`.

    Raises:
        DataError: listing the record's fields and the known formats, if no format matches.
    """
    for name, (required, optional) in FIELDS.items():
        if record.keys() >= set(required) and set(named) <= {*required, *optional}:
            return name
    known = "; ".join(f"{name}: {', '.join(required)}" for name, (required, _) in FIELDS.items())
    raise DataError(
        f"no format matches the fields {', '.join(map(str, record)) or '(none)'} (expected {known}); "
        f"`columns` maps other names, such as `columns={COLUMNS_EXAMPLE}`"
    )


def parse_columns(text: str) -> dict[str, str]:
    """Names of columns as they are typed: `prompt=question,completion=answer`.

    Raises:
        ConfigError: quoting what has another form.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for name, _, column in pairs:
        if not name.strip() or not column.strip():
            raise ConfigError(f"columns must be written as {COLUMNS_EXAMPLE}; got {quoted(text)}")
    return {name.strip(): column.strip() for name, _, column in pairs}


def question(prompt: str, input: str = "") -> str:
    """A prompt and what it applies to, as one text."""
    return f"{prompt}\n\n{input}" if input else prompt


def instruction_prompt(instruction: str, input: str = "", *, indent: int = 0) -> str:
    """An instruction in Stanford Alpaca's template, up to the line where the answer begins.

    Args:
        input: what the instruction applies to.
        indent: spaces before every line but the first two; the caller adds them to the answer. With 16, the text is
            that of CoreNet's `commonsense_170k.py`, including its trailing spaces.
    """
    context = ", paired with an input that provides further context" if input else ""
    margin = " " * indent
    end = ("" if not indent else " " if input else "  ") + "\n\n"
    parts = [("Instruction", instruction), *([("Input", input)] if input else [])]
    return (
        f"Below is an instruction that describes a task{context}. "
        f"Write a response that appropriately completes the request.{end}"
        + "".join(f"{margin}### {name}:\n{margin}{text}\n{margin}\n" for name, text in parts)
        + f"{margin}### Response:\n"
    )
