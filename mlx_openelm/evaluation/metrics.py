"""What the scores of an item are worth: the metrics of lm-eval's multiple-choice tasks, and their standard errors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ..errors import EvaluationError
from .items import Item, ItemResult
from .requests import Score

ROUNDED = "_bf16"  # at the end of the name of a metric that was computed from `Score.rounded`


def grade(item: Item, scores: Sequence[Score], metrics: Iterable[str]) -> ItemResult:
    """What metrics make of an item's scores.

    If all scores have `rounded`, each metric also has a value from these, named like `acc_bf16`.

    Args:
        scores: one for each request of the item, in their order.
        metrics: names from `METRICS`.
    Raises:
        EvaluationError: if a metric is unknown.
    """
    assert len(scores) == len(item.requests), f"{len(scores)} scores for {len(item.requests)} requests"
    names = checked_metrics(metrics)
    values = _values(item, [score.log_likelihood for score in scores], names)
    rounded = [score.rounded for score in scores if score.rounded is not None]
    if len(rounded) == len(scores):
        values |= {name + ROUNDED: value for name, value in _values(item, rounded, names).items()}
    return ItemResult(item, tuple(scores), values)


def checked_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """Names of metrics, each of them known.

    Raises:
        EvaluationError: if one is unknown.
    """
    names = tuple(names)
    for name in names:
        if name not in METRICS:
            raise EvaluationError(f"unknown metric {name!r} (choose from {', '.join(METRICS)})")
    return names


def is_count(metric: str) -> bool:
    """Whether a metric is 1 or 0 for each item, so that its mean is a share of the items."""
    return metric.removesuffix(ROUNDED) in _COUNTING


def mean(values: Sequence[float]) -> float:
    """The mean, added up in the order of the items as lm-eval does; NaN without values."""
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean: sample standard deviation over the square root of the count.

    `None` for fewer than two values.
    """
    if len(values) < 2:
        return None
    center = mean(values)
    variance = sum((value - center) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def pooled_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean of a group of tasks, weighted by their numbers of items; NaN without items."""
    total = sum(sizes)
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / total if total else math.nan


def pooled_standard_error(errors: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """Standard error of `pooled_mean`, from those of the tasks; `None` if one of them has none.

    The variances are pooled, each weighted by its degrees of freedom. Differences between the tasks do not count.
    """
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    squares = sum((size - 1) * size * error**2 for error, size in zip(known, sizes, strict=True))
    return math.sqrt(squares / (sum(sizes) - len(sizes)) / sum(sizes))


def _values(item: Item, likelihoods: Sequence[float], names: Iterable[str]) -> dict[str, float]:
    return {name: METRICS[name](item, np.array(likelihoods, np.float64)) for name in names}


def _accuracy(item: Item, likelihoods: np.ndarray) -> float:
    """Whether the likeliest choice is a right one; of equal ones the first counts, and NaN counts as the likeliest."""
    return float(int(np.argmax(likelihoods)) in item.gold)


def _per_character(item: Item, likelihoods: np.ndarray) -> float:
    return _accuracy(item, _divided(likelihoods, [len(choice) for choice in item.choices]))


def _per_byte(item: Item, likelihoods: np.ndarray) -> float:
    return _accuracy(item, _divided(likelihoods, [len(choice.encode("utf-8", "replace")) for choice in item.choices]))


def _divided(likelihoods: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):  # an empty choice is infinitely unlikely
        return likelihoods / np.array(lengths, np.float64)


def _true_share(item: Item, likelihoods: np.ndarray) -> float:
    """The probability of the true answers, of that of all answers."""
    with np.errstate(invalid="ignore"):
        shares = np.exp(likelihoods - likelihoods.max())  # relative to the likeliest, so that not all of them are 0
        return float(shares[list(item.gold)].sum() / shares.sum())


def _stereotype(item: Item, likelihoods: np.ndarray) -> float:
    """Whether the first sentence of a pair, the one with the stereotype, is likelier than the other."""
    first, second = likelihoods
    return float(first > second)


def _difference(item: Item, likelihoods: np.ndarray) -> float:
    """How far apart the two sentences of a pair are, in nats; there is no limit to it."""
    first, second = likelihoods
    with np.errstate(invalid="ignore"):
        return float(abs(first - second))


METRICS: Mapping[str, Callable[[Item, np.ndarray], float]] = {
    "acc": _accuracy,
    "acc_norm": _per_character,
    "acc_bytes": _per_byte,
    "mc2": _true_share,
    "pct_stereotype": _stereotype,
    "likelihood_diff": _difference,
}
_COUNTING = frozenset({"acc", "acc_norm", "acc_bytes", "pct_stereotype"})
