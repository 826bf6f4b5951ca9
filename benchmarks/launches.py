"""How many kernels a Metal GPU starts for one token, counted without one: this package against mlx-lm.

The graph of a decoding step is built with the choices for Metal and exported, never evaluated; what each of its
primitives costs stands in MLX's source (`metal_costs.py`). Networks and caches take no memory (`weightless.py`).

python benchmarks/launches.py [--size 270M,1.1B] [--bits 0,4] [--rows 1,4] [--kv full,8,4,window] [--detail]
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any
from unittest import mock

import mlx.core as mx
from common import report
from metal_costs import Cost, Step, count
from mlx.utils import tree_flatten
from step_graph import Graph, Recorder, as_on_metal, blank, drawn, fused, traced
from weightless import our_cache, our_network, peer_model, peer_step_alone, peer_step_of_rows

from mlx_openelm import CacheConfig, OpenELMConfig, SamplingConfig
from mlx_openelm.generation import decode_step
from mlx_openelm.generation.sampling import Sampler
from mlx_openelm.kernels.fused import forget_kernels
from mlx_openelm.machine.device import choices, replaced_choices

SIZES = ("270M", "450M", "1.1B", "3B")
KINDS = ("full", "8", "4", "window")
WINDOW = 512  # tokens
TOKENS = 500  # before the step
WITHOUT_KERNELS = "without its own kernels"
_VIEWS = {"Transpose", "Broadcast", "ExpandDims", "Squeeze", "Split", "Slice"}


@dataclass(frozen=True)
class Case:
    """A step to count, of greedy decoding."""

    size: str
    bits: int = 0  # of the weights; 0: bfloat16
    rows: int = 1
    kv: str = "full"  # one of KINDS
    tokens: int = TOKENS
    large_chip: bool = False  # Max and Ultra

    @property
    def cache(self) -> CacheConfig:
        """How keys and values are stored."""
        if self.kv == "window":
            return CacheConfig(window=WINDOW)
        return CacheConfig() if self.kv == "full" else CacheConfig(bits=int(self.kv))

    @property
    def held(self) -> int:
        """Number of tokens before the step, enough to fill a window and overwrite part of it."""
        return self.tokens + 2 * WINDOW if self.kv == "window" else self.tokens

    @property
    def is_common(self) -> bool:
        """Whether both packages can do it: rows of a batch have no windows here, and no quantized keys in mlx-lm."""
        return self.rows == 1 or self.kv == "full"


def our_step(case: Case, **replaced: Any) -> Step:
    """The costs of this package's step, with the choices for Metal, or others in their place."""
    with as_on_metal() as recorder, replaced_choices(backend="metal", **replaced), _kernels():
        network = our_network(OpenELMConfig.preset(case.size), case.bits)
        cache = our_cache(network, case.cache, case.rows, case.held)
        sampler = Sampler(SamplingConfig())
        states = [sampler.start(mx.array([5]), seed=0) for _ in range(case.rows)]
        state = tuple(mx.stack(list(parts)) for parts in zip(*states, strict=True))
        mx.eval(state)
        compiler = _Compiler(recorder)
        with mock.patch.object(decode_step, "compile_function", compiler):
            step = decode_step.DecodeStep(
                network, lambda logits, state: sampler.choose_rows(logits[:, -1], state), True
            )
            chosen = step(blank((case.rows,), mx.uint32)[:, None], state, cache)
        (graph,) = compiler.graphs
        leaves: Any = tree_flatten(chosen)
        _compare(graph, drawn([*(array for _, array in leaves), *cache.arrays]))
        return count(graph, case.large_chip)


def peer_step(case: Case) -> Step:
    """The costs of mlx-lm's step."""
    from mlx_lm.models import openelm as peer

    def build() -> list[mx.array]:
        if case.rows > 1:
            return peer_step_of_rows(model, case.rows, case.held)
        return peer_step_alone(model, case.cache, case.held)

    with as_on_metal() as recorder, mock.patch.object(peer, "swiglu", recorder.swiglu):
        model = peer_model(OpenELMConfig.preset(case.size), case.bits)
        graph = traced(build, [], recorder)
        _compare(graph, drawn(build()))
        return count(graph, case.large_chip)


@contextmanager
def _kernels() -> Iterator[None]:
    """Let this package's kernels be created anew, by stand-ins, and not be tried out: they compute nothing here."""
    forget_kernels()
    try:
        with mock.patch.object(decode_step, "kernels_work", return_value=choices().fused_kernels):
            yield
    finally:
        forget_kernels()


class _Compiler:
    """In place of `compile_function`: keeps the graphs of what is compiled."""

    def __init__(self, recorder: Recorder):
        self.graphs: list[Graph] = []
        self._recorder = recorder

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.graphs.append(fused(traced(function, list(arguments), self._recorder)))
            return mx.compile(function)(*arguments)

        return run


def _compare(graph: Graph, names: Counter[str]) -> None:
    """Make sure that the graph that is counted is the one that MLX would evaluate, but for views around it.

    Raises:
        AssertionError: if it is another one.
    """
    stand_ins = Counter("Depends" if node.is_stand_in else node.name for node in graph.nodes)
    more, fewer = names - stand_ins, stand_ins - names
    assert not fewer, f"MLX's own graph does not have {dict(fewer)}, but {dict(more)}"
    assert set(more) <= _VIEWS, f"MLX's own graph also has {dict(more)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default=",".join(SIZES))
    parser.add_argument("--bits", default="0,4", help="of the weights; 0: bfloat16")
    parser.add_argument("--rows", default="1,4", help="of a batch")
    parser.add_argument("--kv", default=",".join(KINDS), help="how keys and values are stored")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="before the step")
    parser.add_argument("--large-chip", action="store_true", help="as for a Max or Ultra")
    parser.add_argument("--detail", action="store_true", help="by primitive")
    parser.add_argument("--result", default="launches", help="name of the file under results/")
    arguments = parser.parse_args()
    parts = (getattr(arguments, name).split(",") for name in ("size", "bits", "rows", "kv"))
    cases = [
        Case(size, int(bits), int(rows), kv, arguments.tokens, arguments.large_chip)
        for size, bits, rows, kv in product(*parts)
    ]
    rows: list[list[str]] = [["model", "weights", "rows", "keys and values", "", "launches", "copies", *_HEADING]]
    results = []
    for case in cases:
        if not case.is_common:
            continue
        steps = {
            "openelm-mlx": our_step(case),
            WITHOUT_KERNELS: our_step(case, fused_kernels=False),
            "mlx-lm": peer_step(case),
        }
        for name, step in steps.items():
            what = case.size, f"{case.bits} bits" if case.bits else "bfloat16", str(case.rows), case.kv, name
            rows.append([*what, *_figures(step.total)])
            if arguments.detail:
                _show(name, step)
        results.append({"case": asdict(case), **{name: asdict(step.total) for name, step in steps.items()}})
    report(arguments.result, rows, {"results": results})


_HEADING = ("MB read", "MB written", "in flight: more launches", "more MB")


def _figures(cost: Cost) -> list[str]:
    megabytes = [f"{number / 1e6:,.1f}" for number in (cost.bytes_read, cost.bytes_written, cost.bytes_in_flight)]
    return [f"{cost.launches:,}", f"{cost.copies:,}", *megabytes[:2], f"{cost.launches_in_flight:,}", megabytes[2]]


def _show(name: str, step: Step) -> None:
    """Print what each primitive costs."""
    print(name)
    occurrences = step.graph.names()
    for primitive, cost in sorted(step.by_name.items(), key=lambda pair: -pair[1].launches):
        if cost.launches:
            print(f"  {cost.launches:5} launches, {cost.copies:3} copies  {occurrences[primitive]:5} x {primitive}")


if __name__ == "__main__":
    main()
