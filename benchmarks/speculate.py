"""The speed-up from speculative decoding, and that it never changes the text.

* 500 prompts that the built-in model generated, each continued greedily by 64 tokens: without draft tokens, with prompt
  lookup, and with the model's own first layers as a draft model. Tokens that differ are counted.
* A model of 8 layers with a draft model of 2 narrow layers. The acceptance rate decides the gain, so it is imposed: the
  draft model does all its work, but each of its tokens is replaced by the right token or a wrong one.
* Prompt lookup on the greedy text of that model, on a text that repeats in a cycle (of the model without attention,
  where the next token depends on the last one alone), and on stories of the built-in model in float32, which hardly
  repeat themselves.

Times are those of decoding without prefill, in turn, as ratios to decoding without draft tokens.

python benchmarks/speculate.py [--only identical] [--prompts 500] [--rounds 5]
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from common import RESULTS, in_turn, machine, report, summary
from mlx.utils import tree_flatten

from mlx_openelm import OpenELM, OpenELMConfig, SamplingConfig, Tokenizer, generate_tokens, load
from mlx_openelm.benchmark.models import random_network
from mlx_openelm.generation.drafters import Drafter, DraftModel, PromptLookup
from mlx_openelm.generation.sampling import State
from mlx_openelm.generation.speculative import speculate_tokens
from mlx_openelm.quantization import dequantized

TARGET = OpenELMConfig.layerwise(8, 768, 64, num_gqa_groups=2, ffn_dim_divisor=256, vocab_size=8000)
DRAFT = OpenELMConfig.layerwise(2, 256, 64, num_gqa_groups=2, ffn_dim_divisor=128, vocab_size=8000)
STORIES = ("Once upon a time there was", "The little dog", "Lily and Tom went to the park")


class Imposed(DraftModel):
    """A draft model with an imposed share of right draft tokens."""

    def __init__(self, model: OpenELM, known: Sequence[int], agreement: float):
        super().__init__(model)
        self._known = known
        self._agreement = agreement
        self._rng = np.random.default_rng(0)

    def draft(self, text: Sequence[int], count: int, state: State) -> mx.array | None:
        """The imposed draft tokens, once the draft model is done."""
        own = super().draft(text, count, state)
        assert own is not None, "a draft model always guesses"
        right = self._known[len(text) : len(text) + count]
        wrong = self._rng.random(len(right)) >= self._agreement
        imposed = [(token + int(is_wrong)) % 8000 for token, is_wrong in zip(right, wrong, strict=True)]
        return mx.array(imposed, mx.uint32) + 0 * own[: len(right)]  # still waits for the draft model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200, help="of the text on which times are taken")
    parser.add_argument("--only", choices=("identical", "speed"), help="the other figures stay as they were")
    arguments = parser.parse_args()
    network, tokenizer = load()
    kept = RESULTS / "speculate.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if arguments.only else {}
    if arguments.only != "speed":
        found["identical"] = {**identical(network, arguments.prompts), "machine": machine()}
    if arguments.only != "identical":
        found["imposed"] = imposed_agreement(arguments.tokens, arguments.rounds)
        found["lookup"] = lookup(in_full(network), tokenizer, arguments.tokens, arguments.rounds)
        found["speed_machine"] = machine()
    same = found["identical"]
    rows = [["", "speed against no guesses", "guesses right"]]
    gains = {**found["imposed"], **found["lookup"]}
    rows += [[name, f"{gain['ratio']:.2f}", f"{gain['acceptance']:.0%}"] for name, gain in gains.items()]
    print(f"{same['prompts']} prompts, {same['tokens']:,} tokens, of which differ: {same['different']}")
    report("speculate", rows, {key: found[key] for key in ("identical", "imposed", "lookup", "speed_machine")})


def identical(network: OpenELM, count: int) -> dict:
    """Greedy texts with and without draft tokens, compared token by token."""
    drafters: dict[str, Drafter] = {
        "prompt lookup": PromptLookup(),
        "first layers": DraftModel(first_layers(network, 2)),
    }
    different = dict.fromkeys(drafters, 0)
    tokens = 0
    for number in range(count):
        sampling = SamplingConfig(temperature=1.0, seed=number)
        own = [step.token for step in generate_tokens(network, [1], max_tokens=8 + number % 25, sampling=sampling)]
        prompt = [1, *own]
        plain = [step.token for step in generate_tokens(network, prompt, max_tokens=64)]
        tokens += len(plain)
        for name, drafter in drafters.items():
            guessed = [step.token for step in speculate_tokens(network, prompt, drafter, max_tokens=64)]
            different[name] += sum(one != other for one, other in zip(plain, guessed, strict=True))
    acceptance = {name: drafter.accepted / max(1, drafter.drafted) for name, drafter in drafters.items()}
    drafted = {name: drafter.drafted for name, drafter in drafters.items()}
    return {
        "prompts": count,
        "tokens": tokens,
        "different": different,
        "drafted": drafted,
        "acceptance": acceptance,
    }


def imposed_agreement(tokens: int, rounds: int) -> dict:
    """Speed with a draft model that is right 100, 70, 50 and 0 % of the time."""
    target, draft = random_network(TARGET, mx.float32), random_network(DRAFT, mx.float32)
    prompt: Any = mx.random.randint(1, 8000, (32,), key=mx.random.key(2)).tolist()
    known = [*prompt, *(step.token for step in generate_tokens(target, prompt, max_tokens=tokens))]
    makers: dict[str, Callable[[], Drafter | None]] = {"none": lambda: None}
    for agreement in (1.0, 0.7, 0.5, 0.0):
        makers[f"right {agreement:.0%} of the time"] = partial(Imposed, draft, known, agreement)
    return _gains(target, [prompt], makers, tokens, rounds)


def lookup(tiny: OpenELM, tokenizer: Tokenizer, tokens: int, rounds: int) -> dict:
    """Speed with prompt lookup: on texts that repeat themselves, and on stories, which hardly do."""
    makers: dict[str, Callable[[], Drafter | None]] = {"none": lambda: None, "prompt lookup": PromptLookup}
    target = random_network(TARGET, mx.float32)
    prompt: Any = mx.random.randint(1, 8000, (32,), key=mx.random.key(2)).tolist()

    def gain(beginning: list[int]) -> dict:
        text = [step.token for step in generate_tokens(target, beginning, max_tokens=tokens)]
        gains = _gains(target, [beginning], makers, tokens, rounds)["prompt lookup"]
        return {**gains, "pairs_seen_before": _seen_before(beginning, text)}

    found = {"prompt lookup, a text that repeats itself now and then": gain(prompt)}
    for layer in target.transformer.layers:  # the next token depends on the last one alone, so the text cycles
        layer.attn.out_proj.weight = mx.zeros_like(layer.attn.out_proj.weight)
    walk = [step.token for step in generate_tokens(target, prompt, max_tokens=2 * tokens)]
    found["prompt lookup, a text in circles"] = gain([*prompt, *walk])
    stories = [tokenizer.encode(beginning) for beginning in STORIES]
    return {**found, "prompt lookup, stories": _gains(tiny, stories, makers, tokens, rounds)["prompt lookup"]}


def _seen_before(beginning: list[int], text: list[int]) -> float:
    """Share of a text's pairs of adjacent tokens that occurred before."""
    pairs = list(pairwise([*beginning, *text]))
    return sum(pairs[place] in pairs[:place] for place in range(len(beginning), len(pairs))) / len(text)


def _gains(
    network: OpenELM,
    prompts: list[list[int]],
    makers: dict[str, Callable[[], Drafter | None]],
    tokens: int,
    rounds: int,
) -> dict:
    acceptance = {}

    def seconds(name: str) -> float:
        spent = 0.0
        drafted = accepted = 0
        for prompt in prompts:
            drafter = makers[name]()
            steps = (
                generate_tokens(network, prompt, max_tokens=tokens)
                if drafter is None
                else speculate_tokens(network, prompt, drafter, max_tokens=tokens)
            )
            next(steps)
            started = time.perf_counter()
            for _ in steps:
                pass
            spent += time.perf_counter() - started
            if drafter is not None:
                drafted, accepted = drafted + drafter.drafted, accepted + drafter.accepted
        acceptance[name] = accepted / max(1, drafted)
        return spent

    times = in_turn({name: partial(seconds, name) for name in makers}, rounds)
    medians = {name: summary(of) for name, of in times.items()}
    return {
        name: {
            "seconds": medians[name],
            "ratio": medians["none"]["median"] / medians[name]["median"],
            "acceptance": acceptance[name],
        }
        for name in makers
        if name != "none"
    }


def first_layers(network: OpenELM, count: int) -> OpenELM:
    """A network of the first layers alone, with the embedding and the last norm."""
    config = network.config
    short = replace(
        config,
        num_transformer_layers=count,
        num_query_heads=config.num_query_heads[:count],
        num_kv_heads=config.num_kv_heads[:count],
        ffn_multipliers=config.ffn_multipliers[:count],
    )
    full = in_full(network)
    model = OpenELM(short)
    wanted: Any = tree_flatten(model.parameters())
    there: Any = tree_flatten(full.parameters())
    kept = {name for name, _ in wanted}
    model.load_weights([(name, array) for name, array in there if name in kept])
    model.eval()
    return model


def in_full(network: OpenELM) -> OpenELM:
    """The same network without quantization."""
    model = OpenELM(network.config)
    dtype = network.transformer.norm.weight.dtype
    arrays: dict[str, Any] = tree_flatten(network.parameters(), destination={})  # type: ignore[assignment]
    for path, layer in network.named_modules():
        if hasattr(layer, "bits"):
            for part in ("scales", "biases"):
                arrays.pop(f"{path}.{part}", None)
            arrays[f"{path}.weight"] = dequantized(layer, dtype)
    model.load_weights(list(arrays.items()))
    model.eval()
    return model


if __name__ == "__main__":
    main()
