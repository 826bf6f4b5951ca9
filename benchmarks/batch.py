"""Eight prompts of unequal length at once: this package's batches against mlx-lm's `BatchGenerator`, same weights.

The prompts have 5 to 120 tokens, and each is continued by the same number of tokens. The time includes prefill. Every
row is compared with the tokens that its prompt gets alone.

python benchmarks/batch.py [--tokens 128] [--rounds 5]
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from common import in_turn, report, summary

from mlx_openelm import CacheConfig, OpenELM, OpenELMConfig, generate_tokens, load_model
from mlx_openelm.benchmark.models import Contestant, Ours, Peer, random_network

LENGTHS = (5, 120, 17, 64, 9, 90, 33, 48)
NARROW = OpenELMConfig.layerwise(16, 128, 32, num_gqa_groups=2, ffn_dim_divisor=16, vocab_size=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large-tokens", type=int, default=24, help="tokens of the large model, which takes long")
    arguments = parser.parse_args()
    networks: dict[str, tuple[Callable[[], OpenELM], int]] = {
        "openelm-tiny": (lambda: load_model(), arguments.tokens),
        "16 narrow layers": (lambda: random_network(NARROW, mx.float32), arguments.tokens),
        "270M, float32": (lambda: random_network(OpenELMConfig.preset("270M"), mx.float32), arguments.large_tokens),
    }
    rows = [["", "ours, tokens/s", "mlx-lm, tokens/s", "ratio", "rows as alone"]]
    figures = {}
    for name, (make, tokens) in networks.items():
        network = make()
        key = mx.random.key(1)
        ids: Any = mx.random.randint(1, network.config.vocab_size, (sum(LENGTHS),), key=key).tolist()
        ends = [sum(LENGTHS[: place + 1]) for place in range(len(LENGTHS))]
        prompts: list[list[int]] = [ids[end - length : end] for end, length in zip(ends, LENGTHS, strict=True)]

        contestants: list[Contestant] = [Ours(network), Peer(network)]
        measured = in_turn({who.name: partial(rate, who, prompts, tokens) for who in contestants}, arguments.rounds)
        found = {who: summary(rates) for who, rates in measured.items()}
        together = Ours(network).run(prompts, tokens, CacheConfig()).tokens
        alone = [[step.token for step in generate_tokens(network, prompt, max_tokens=tokens)] for prompt in prompts]
        same = sum(one == other for one, other in zip(together, alone, strict=True))
        ratio = found["openelm-mlx"]["median"] / found["mlx-lm"]["median"]
        ours, theirs = (f"{found[who]['median']:,.1f}" for who in ("openelm-mlx", "mlx-lm"))
        rows.append([name, ours, theirs, f"{ratio:.2f}", f"{same} of {len(prompts)}"])
        figures[name] = {"tokens_per_second": found, "ratio": ratio, "rows_as_alone": same, "tokens": tokens}
    report("batch", rows, {"prompt_lengths": LENGTHS, "models": figures})


def rate(contestant: Contestant, prompts: list[list[int]], tokens: int) -> float:
    """Generated tokens per second, including prefill."""
    run = contestant.run(prompts, tokens, CacheConfig())
    return len(prompts) * tokens / (run.first_token_seconds + run.decode_seconds)


if __name__ == "__main__":
    main()
