"""`generate --input`: the answers to a file of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from ..data.record_files import RECORD_ENDINGS
from ..errors import OutputError, OutputExistsError
from ..files.output import OutputFile
from ..files.paths import exists, is_folder
from ..generation.answer_file import AnswerFile, AnswerRun, Answers, is_answer_file, is_finished
from ..generation.batch import check_batch, generate_batch
from ..generation.prompt_cache import model_fingerprint
from ..generation.prompt_file import Prompt, read_prompts
from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from .interrupts import INTERRUPTED
from .terminal import say, write
from .text_view import answer_bar

_OTHER_FORMATS = tuple(ending for ending in RECORD_ENDINGS if ending != ".jsonl")


def check_output(output: Path, force: bool) -> None:
    """Make sure that a file for answers can be written, or may be finished already.

    Raises:
        OutputError: if not.
    """
    if is_folder(output):
        raise OutputError(f"--output must be a file; {output} is a folder")
    if output.name.endswith(_OTHER_FORMATS):
        raise OutputError(f"--output is a file of JSON lines; name it .jsonl instead of {output.name}")
    if exists(output) and not force and not is_answer_file(output):
        raise OutputExistsError(output)


def answer_prompts(
    network: OpenELM,
    tokenizer: Tokenizer,
    path: Path,
    output: OutputFile | None,
    batch_size: int,
    options: dict[str, Any],
    about: dict[str, Any],
    there: Path | None,
) -> None:
    """Answer the prompts of a file.

    Args:
        output: the file to write; `None`: answers go to stdout.
        options: arguments of `generate_batch`.
        about: `chat`, `system` and `columns`, as for `read_prompts`.
        there: a file that may hold all answers already.
    Raises:
        OutputExistsError: if it holds anything else.
    """
    prompts = read_prompts(path, tokenizer, **about)
    ids = [prompt.tokens for prompt in prompts]
    check_batch(network, ids, batch_size=batch_size, max_tokens=options["max_tokens"], cache=options["cache"])
    run = _run(network, prompts, options, about)
    if there is not None:
        if not is_finished(there, run):
            raise OutputExistsError(there)
        say(f"{there} is finished: {_answers(len(prompts))}; use --force to answer again")
        return
    answers = AnswerFile(run, output) if output is not None else Answers(run, write)
    if answers.drawn_seed is not None:
        options["sampling"] = replace(options["sampling"], seed=answers.drawn_seed)
    missing = answers.missing
    if len(missing) < len(prompts):
        say(f"{len(prompts) - len(missing):,} of {len(prompts):,} prompts already answered")
    try:
        with closing(answers), answer_bar(len(prompts), len(prompts) - len(missing)) as moved:
            for number, generation in generate_batch(
                network, tokenizer, ids, batch_size=batch_size, numbers=missing, **options
            ):
                answers.add(number, generation)
                moved(len(generation.tokens))
            answers.finish()
    except KeyboardInterrupt:
        done = len(prompts) - len(answers.missing)
        kept = f"; run the same command again to resume from {output.name}.part" if output is not None and done else ""
        say(f"interrupted after {done:,} of {len(prompts):,} answers{kept}")
        raise typer.Exit(INTERRUPTED) from None
    if output is not None:
        say(f"wrote {_answers(len(prompts))} to {output.name}")
    if answers.drawn_seed is not None:
        say(f"the seed was random; --seed {answers.drawn_seed} gives the same answers")


def _run(
    network: OpenELM, prompts: Sequence[Prompt], options: Mapping[str, Any], about: Mapping[str, Any]
) -> AnswerRun:
    sampling, drawn = options["sampling"], options["sampling"].with_seed()
    settings = {
        **about,
        "max_tokens": options["max_tokens"],
        "stop": list(options["stop"]),
        **asdict(sampling),
        **asdict(options["cache"]),
        "model": model_fingerprint(network),
    }
    return AnswerRun(prompts, settings, None if drawn == sampling else drawn.seed)


def _answers(number: int) -> str:
    return f"{number:,} answer{'' if number == 1 else 's'}"
