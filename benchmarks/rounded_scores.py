"""How many answers change if scores are rounded to bfloat16, as those of the published models were: a simulation.

The log-probabilities of tokens are drawn at random, about three nats each, those of the right choice somewhat smaller.
They are rounded, and so is their sum. Of equal choices the first is the answer; of two equal sentences of CrowS-Pairs,
none counts as a stereotype.

python benchmarks/rounded_scores.py
"""

import numpy as np

ITEMS, NATS, RIGHT = 100_000, 3.0, 0.85
CASES = ((3, 2), (3, 4), (10, 2), (10, 4), (20, 4), (30, 4))  # tokens, choices


def main() -> None:
    draw = np.random.default_rng(0)
    print("tokens  choices  nats  other answer  right or wrong no longer  difference in accuracy")
    for tokens, choices in CASES:
        show(draw, -draw.exponential(NATS, (ITEMS, choices, tokens)))
    print("\nMMLU and BoolQ: one token each, almost equally likely")
    for choices in (4, 2):
        show(draw, -draw.normal(1.5, 0.3, (ITEMS, choices, 1)))
    print("\nCrowS-Pairs: sentences of 20 tokens, of which 3 differ much and the others a little")
    common = -draw.exponential(NATS, (ITEMS, 1, 17)) * draw.normal(1, 0.05, (ITEMS, 2, 17))
    pairs = np.concatenate([common, -draw.exponential(NATS, (ITEMS, 2, 3))], axis=-1)
    exact, coarse = pairs.sum(-1), rounded_sum(pairs)
    equal = (coarse[:, 0] == coarse[:, 1]).mean()
    change = (coarse[:, 0] > coarse[:, 1]).mean() - (exact[:, 0] > exact[:, 1]).mean()
    print(f"{equal:.2%} equal, difference in pct_stereotype {change:+.2%}")


def show(draw: np.random.Generator, scores: np.ndarray) -> None:
    """Print what changes; `scores` are of items, choices and tokens."""
    _, choices, tokens = scores.shape
    gold = draw.integers(0, choices, ITEMS)
    scores[np.arange(ITEMS), gold] *= RIGHT
    exact, coarse = scores.sum(-1), rounded_sum(scores)
    ours, theirs = exact.argmax(-1), coarse.argmax(-1)
    flips = (ours == gold) != (theirs == gold)
    change = (theirs == gold).mean() - (ours == gold).mean()
    print(
        f"{tokens:6}  {choices:7}  {-exact.mean():4.0f}  {(ours != theirs).mean():12.2%}"
        f"  {flips.mean():24.2%}  {change:+22.3%}"
    )


def rounded_sum(scores: np.ndarray) -> np.ndarray:
    """The sum over the last axis, of values rounded to bfloat16, rounded again."""
    return rounded(rounded(scores).sum(-1))


def rounded(values: np.ndarray) -> np.ndarray:
    """The nearest values of bfloat16, the upper half of a float32; of two as near, the even one."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


if __name__ == "__main__":
    main()
