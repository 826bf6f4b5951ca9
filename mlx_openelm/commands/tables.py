"""Tables and lists that fit the width of the terminal; nothing is cut off."""

import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from textwrap import TextWrapper

from .streams import clean, is_terminal
from .terminal import write, write_styled

_GAP = "  "
_NARROWEST = 20  # characters; in less, lines become wider than the terminal

Row = Sequence[str]


def line_width() -> int | None:
    """Characters in a line of the terminal that shows stdout; `None`, no limit, if it is a file or a pipe."""
    if not is_terminal(sys.stdout):
        return None
    return max(shutil.get_terminal_size().columns, _NARROWEST)


def write_table(
    headings: Row, sections: Sequence[Sequence[Row]], *, left: Collection[int] = (), num_keys: int = 1
) -> None:
    """Print a table, its sections divided by lines.

    Headings are wrapped if the table is too wide otherwise. If it still is, it becomes several tables one below the
    other, each with the columns that say what a row is about, or if those are too wide, with the number of the row.

    Args:
        left: numbers of the columns that are aligned at the left.
        num_keys: number of the first columns, those to repeat.
    """
    limit = line_width()
    sections = [[[clean(cell) for cell in row] for row in section] for section in sections]
    wide, narrow = _widths(headings, sections)
    widths = wide if limit is None or _total(wide) <= limit else narrow
    if limit is not None and _total([*widths[:num_keys], max(widths[num_keys:], default=0)]) > limit:
        numbers = count(1)
        sections = [[[str(next(numbers)), *row] for row in section] for section in sections]
        headings, left, num_keys = ["#", *headings], [at + 1 for at in left], 1
        _, widths = _widths(headings, sections)
    for number, columns in enumerate(_groups(widths, num_keys, limit)):
        if number:
            write("")
        _write_columns(headings, sections, columns, widths, left)


def write_list(values: Mapping[str, str]) -> None:
    """Print names and values, one per line; long values continue below their beginning."""
    column = max(map(_cells, values)) + len(_GAP)
    for name, value in values.items():
        first, *more = value.split("\n")
        for line in (_padded(name, column) + first, *(" " * column + line for line in more)):
            write_text(line, " " * column)


def write_text(text: str, indent: str = "") -> None:
    """Print lines of text, wrapped between words, with continuation lines indented."""
    width = line_width()
    for line in text.split("\n"):
        write(line if width is None else _wrapped(line, width, indent))


def write_parts(parts: Sequence[str]) -> None:
    """Print parts with commas between them; see `in_lines`."""
    write(in_lines(parts, line_width()))


def in_lines(parts: Sequence[str], width: int | None, indent: str = "  ") -> str:
    """Parts with commas between them, in as many lines as needed; only a part longer than a line is divided."""
    if width is None:
        return ", ".join(parts)
    lines: list[str] = []
    for number, part in enumerate(parts):
        last = part + ("," if number < len(parts) - 1 else "")
        if lines and _cells(f"{lines[-1]} {last}") <= width:
            lines[-1] += f" {last}"
        else:
            lines += _wrapped((indent if lines else "") + last, width, 2 * indent).split("\n")
    return "\n".join(lines)


def _wrapped(line: str, width: int, indent: str) -> str:
    if _cells(line) <= width:
        return line
    if _cells(indent) > width // 2:
        indent = "  "
    # Spaces that align a value are not to be wrapped at, so the first word is everything up to it.
    wrapper = TextWrapper(
        width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    return "\n".join(wrapper.wrap(line))


def _widths(headings: Row, sections: Sequence[Sequence[Row]]) -> tuple[list[int], list[int]]:
    """Widths of the columns with whole headings, and with headings wrapped at spaces."""
    values = [
        max((_cells(row[at]) for section in sections for row in section), default=0) for at in range(len(headings))
    ]
    whole = [max(value, _cells(heading)) for value, heading in zip(values, headings, strict=True)]
    words = [max([value, *map(_cells, heading.split())]) for value, heading in zip(values, headings, strict=True)]
    return whole, words


def _groups(widths: Sequence[int], num_keys: int, limit: int | None) -> list[list[int]]:
    """Numbers of the columns of each table; all have the keys."""
    keys = list(range(num_keys))
    groups = [list(keys)]
    for column in range(num_keys, len(widths)):
        fits = limit is None or _total([widths[at] for at in [*groups[-1], column]]) <= limit
        if not fits and len(groups[-1]) > num_keys:
            groups.append(list(keys))
        groups[-1].append(column)
    return groups


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _write_columns(
    headings: Row,
    sections: Sequence[Sequence[Row]],
    columns: Sequence[int],
    widths: Sequence[int],
    left: Collection[int],
) -> None:
    def line(row: Row) -> str:
        padded = [_padded(row[at], widths[at], left=at in left) for at in columns]
        return _GAP.join(padded).rstrip()

    wrapped = [_heading_lines(heading, width) for heading, width in zip(headings, widths, strict=True)]
    height = max(len(wrapped[at]) for at in columns)
    for number in range(height, 0, -1):
        write_styled(line([at[-number] if number <= len(at) else "" for at in wrapped]), "bold")
        write("")
    rule = "-" * _total([widths[at] for at in columns])
    for section in sections:
        write(rule)
        for row in section:
            write(line(row))


def _heading_lines(heading: str, width: int) -> list[str]:
    return TextWrapper(width, break_long_words=False, break_on_hyphens=False).wrap(heading)


def _padded(text: str, width: int, left: bool = True) -> str:
    spaces = " " * (width - _cells(text))
    return text + spaces if left else spaces + text


def _cells(text: str) -> int:
    """Places of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
