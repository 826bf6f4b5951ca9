"""Multiple-choice requests: this package's scorer against `MLXLM.loglikelihood` of mlx-lm, on the same folder.

The requests are made up, with the numbers of tokens that the tasks have. Both load the same weights in float32, so that
scores can be compared. Needs lm-eval, which mlx-lm's class is derived from: pip install lm-eval

python benchmarks/score.py [--size 270M] [--tasks arc,mmlu] [--rounds 3]

With `openelm-mlx-native` installed, this package computes with it, and the results are kept under a name of their own.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from common import in_turn, model_folder, report, summary

from mlx_openelm import OpenELMConfig, Tokenizer, load
from mlx_openelm.evaluation.prefix_tree import tree_size
from mlx_openelm.evaluation.requests import Request
from mlx_openelm.evaluation.scorer import Scorer
from mlx_openelm.machine.device import DTYPES, backend_in_use, on_cpu
from mlx_openelm.machine.native import native_kernels
from mlx_openelm.tokenizer.files import tokenizer_files

_TEXT = """the and was her said then they with she had his for that you not went very little big day play happy saw good
mom dad tree dog cat house water school friend friends park ball home garden bird box food toy car red blue boy girl"""
WORDS = _TEXT.split()
INDENT = "\n" + " " * 16


class Task(NamedTuple):
    """Makes the requests of one item; how many items to score, and the ratio to reach."""

    title: str
    item: Callable[[random.Random, dict[str, Any]], list[Request]]
    num_items: int
    goal: float


def words(chance: random.Random, least: int, most: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(chance.randint(least, most)))


def arc(chance: random.Random, shared: dict[str, Any]) -> list[Request]:
    context = f"Question: {words(chance, 12, 30)}\nAnswer:"
    return [Request(context, " " + words(chance, 1, 6)) for _ in range(4)]


def arc_25(chance: random.Random, shared: dict[str, Any]) -> list[Request]:
    shots = "".join(f"Question: {words(chance, 12, 30)}\nAnswer: {words(chance, 1, 6)}\n\n" for _ in range(25))
    return [Request(shots + context, choice) for context, choice in arc(chance, shared)]


def commonsense(chance: random.Random, shared: dict[str, Any]) -> list[Request]:
    lines = "Below is an instruction that describes a task.", "### Instruction:", words(chance, 50, 90), "### Response:"
    return [Request(INDENT.join(lines) + INDENT, f"the correct answer is answer{n}") for n in range(1, 5)]


def mmlu(chance: random.Random, shared: dict[str, Any]) -> list[Request]:
    if shared.setdefault("left", 0) == 0:  # another subject
        shared["left"] = 25
        shared["shots"] = "".join(question(chance) + f" {chance.choice('ABCD')}\n\n" for _ in range(5))
    shared["left"] -= 1
    context = f"The following are multiple choice questions.\n\n{shared['shots']}{question(chance)}"
    return [Request(context, f" {letter}") for letter in "ABCD"]


def question(chance: random.Random) -> str:
    choices = "".join(f"\n{letter}. {words(chance, 2, 8)}" for letter in "ABCD")
    return f"{words(chance, 25, 60)}{choices}\nAnswer:"


def piqa(chance: random.Random, shared: dict[str, Any]) -> list[Request]:
    context = f"Question: {words(chance, 5, 14)}\nAnswer:"
    return [Request(context, " " + words(chance, 10, 28)) for _ in range(2)]


def winogrande(chance: random.Random, shared: dict[str, Any]) -> list[Request]:
    before, after = words(chance, 8, 16), words(chance, 4, 10)
    return [Request(f"{before} {words(chance, 1, 1)}", " " + after) for _ in range(2)]


TASKS = {
    "arc": Task("ARC, 0 shots", arc, 24, 3.0),
    "arc-25": Task("ARC, 25 shots", arc_25, 2, 3.5),
    "commonsense": Task("commonsense, 4 choices", commonsense, 12, 3.5),
    "mmlu": Task("MMLU, 5 shots", mmlu, 50, 8.0),
    "piqa": Task("PIQA, 0 shots", piqa, 24, 1.5),
    "winogrande": Task("WinoGrande, 0 shots", winogrande, 36, 1.5),
}


class _Instance(NamedTuple):
    """What mlx-lm reads of a request of lm-eval."""

    args: tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="270M")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the folder, in which both compute")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="times as many items")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    with model_folder(options.size, dtype) as folder, contestants(folder, dtype) as (ours, theirs):
        rows = [["", "requests", "tokens of the tree", "computed", "ours, s", "mlx-lm, s", "ratio", "goal", "differ"]]
        figures = {}
        for name in options.tasks.split(","):
            found = figures[name] = compare(TASKS[name], options, ours, theirs)
            seconds = [f"{found['seconds'][who]['median']:,.2f}" for who in ("openelm-mlx", "mlx-lm")]
            counts = [f"{found[key]:,}" for key in ("requests", "tree_tokens", "computed_tokens")]
            ratios = f"{found['ratio']:.2f}", f"{TASKS[name].goal:g}"
            rows.append([TASKS[name].title, *counts, *seconds, *ratios, f"{found['largest_difference']:.1e}"])
    device = ("_native" if native_kernels() else "") if on_cpu() else f"_{backend_in_use()}"
    name = f"score_{options.size}{device}"
    report(name, rows, {"size": options.size, "dtype": options.dtype, "tasks": figures})


def write_tokenizer(folder: Path) -> None:
    """The vocabulary of the built-in model, whose words are tokens, and fillers up to the model's size."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(load()[1].path.read_bytes())
    for number in range(len(model.pieces), OpenELMConfig.preset("270M").vocab_size):
        model.pieces.add(piece=f"▁filler{number}", score=-1e6 - number)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "tokenizer.model"
        path.write_bytes(model.SerializeToString())
        for name, content in tokenizer_files(Tokenizer(path)).items():
            (folder / name).write_bytes(content)


@contextmanager
def contestants(folder: Path, dtype: mx.Dtype) -> Iterator[tuple[Scorer, Any]]:
    """Both with their model in memory."""
    from mlx_lm.evaluate import MLXLM

    write_tokenizer(folder)
    yield Scorer(*load(folder, dtype=dtype)), MLXLM(str(folder))


def compare(task: Task, options: argparse.Namespace, ours: Scorer, theirs: Any) -> dict[str, Any]:
    chance, shared = random.Random(task.title), dict[str, Any]()
    count = max(1, round(task.num_items * options.scale))
    requests = [request for _ in range(count) for request in task.item(chance, shared)]
    encoded = [found for found in map(ours.encode, requests) if found is not None]
    instances = [_Instance((request.context, request.continuation)) for request in requests]
    scores: dict[str, list[float]] = {}
    computed: list[int] = []

    def run_ours() -> float:
        fresh = Scorer(ours.model, ours.tokenizer, ours.config)
        start = time.perf_counter()
        scores["openelm-mlx"] = [score.log_likelihood for score in fresh.score(requests)]
        computed.append(fresh.tokens_computed)
        return time.perf_counter() - start

    def run_theirs() -> float:
        start = time.perf_counter()
        scores["mlx-lm"] = [score for score, _ in theirs.loglikelihood(instances)]
        return time.perf_counter() - start

    print(task.title, file=sys.stderr)
    ours.score(requests[:8])  # compiles kernels, where the device does
    theirs.loglikelihood(instances[:8])
    seconds = in_turn({"openelm-mlx": run_ours, "mlx-lm": run_theirs}, options.rounds, warm_up=0)
    found = {who: summary(figures) for who, figures in seconds.items()}
    return {
        "items": count,
        "requests": len(requests),
        "tree_tokens": tree_size(encoded),
        "computed_tokens": computed[0],
        "seconds": found,
        "ratio": found["mlx-lm"]["median"] / found["openelm-mlx"]["median"],
        "largest_difference": max(abs(one - other) for one, other in zip(*scores.values(), strict=True)),
    }


if __name__ == "__main__":
    main()
