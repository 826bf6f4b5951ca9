"""One question of a task, and how it was answered."""

from dataclasses import dataclass

from .requests import Request, Score


@dataclass(frozen=True)
class Item:
    """One question: the requests whose likelihoods decide the answer, and the right answer.

    Attributes:
        index: position of its record in the test data.
        requests: one for each choice, in their order.
        choices: the text of each choice, without the blank before it; `acc_norm` divides by its number of characters.
        gold: positions of the right choices; one, except in TruthfulQA's mc2.
    """

    index: int
    requests: tuple[Request, ...]
    choices: tuple[str, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class ItemResult:
    """The scores of an item's requests, in their order, and what each metric makes of them (0 to 1)."""

    item: Item
    scores: tuple[Score, ...]
    metrics: dict[str, float]
