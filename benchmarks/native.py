"""Decoding and prefill on the CPU in turn: openelm-mlx with and without openelm-mlx-native, mlx-lm, and llama.cpp.

python benchmarks/native.py [--sizes 270M,1.1B] [--bits 0,4] [--rounds 5] [--prompt 32] [--tokens 16]
    [--llama PYTHON --gguf FOLDER] [--rows 1,2,4,8,16,32] [--contestants "native;without;mlx-lm;llama.cpp"]

All have random weights of the same shapes and as many threads as there are cores. For llama.cpp, `--llama` is a Python
with llama-cpp-python, and `--gguf` a folder with SIZE-F32.gguf, SIZE-Q4_0.gguf, SIZE-Q3_K.gguf, SIZE-Q6_K.gguf or
SIZE-Q8_0.gguf; a missing file is left out. Each contestant is a process of its own that waits for its turn, so that all
see the same load; the best and the median of all rounds are reported.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PEERS = {0: "F32", 3: "Q3_K", 4: "Q4_0", 6: "Q6_K", 8: "Q8_0"}  # llama.cpp's format beside ours, by bits
INT8 = "native, int8"
CONTESTANTS = f"native;{INT8};without;mlx-lm;llama.cpp"
LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, prompt, tokens, threads = sys.argv[1], *map(int, sys.argv[2:])
model = Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
print("ready", flush=True)
for line in sys.stdin:
    model.reset()
    start = time.perf_counter(); model.eval([100 + i for i in range(prompt)]); first = time.perf_counter()
    for i in range(tokens): model.eval([200 + i])
    done = time.perf_counter()
    print(json.dumps([prompt / (first - start), tokens / (done - first)]), flush=True)
"""


def contestant(name: str, size: str, bits: int, prompt: int, tokens: int) -> None:
    """Run in a process of its own: a line on standard input is a turn."""
    import mlx.core as mx

    from mlx_openelm import OpenELMConfig
    from mlx_openelm.benchmark.models import Ours, Peer, random_network
    from mlx_openelm.cache.config import CacheConfig
    from mlx_openelm.quantization import Quantization

    network = random_network(OpenELMConfig.preset(size), mx.float32, Quantization.of(bits) if bits else None)
    runner = Peer(network) if name == "mlx-lm" else Ours(network, compiled=False)
    prompts = [[100 + i % 20_000 for i in range(prompt)]]
    print("ready", flush=True)
    for _ in sys.stdin:
        run = runner.run(prompts, tokens + 1, CacheConfig())
        print(json.dumps([prompt / run.first_token_seconds, tokens / run.decode_seconds]), flush=True)


class Turns:
    """A process that measures once for each line."""

    def __init__(self, command: list[str], **changes: str):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it is ready: the next one would need the memory for making weights, too

    def take(self) -> tuple[float, float]:
        """Tokens per second of prefill and of decoding."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        prefill, decode = json.loads(self.process.stdout.readline())
        return prefill, decode

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def measure(size: str, bits: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each contestant."""
    given = ["--size", size, "--bits", str(bits), "--prompt", str(arguments.prompt), "--tokens", str(arguments.tokens)]
    own = lambda name: [sys.executable, __file__, "--contestant", name, *given]  # noqa: E731
    wanted = arguments.contestants.split(";")
    settings = {"native": "on", INT8: "int8", "without": "off", "mlx-lm": "off"}
    turns = {
        name: Turns(own("native" if name == INT8 else name), OPENELM_MLX_NATIVE=setting)
        for name, setting in settings.items()
        if name in wanted and (bits or name != INT8)
    }
    gguf = arguments.gguf and Path(arguments.gguf) / f"{size}-{PEERS.get(bits)}.gguf"
    if gguf and gguf.exists() and "llama.cpp" in wanted:
        counts = [str(arguments.prompt), str(arguments.tokens), str(len(os.sched_getaffinity(0)))]
        turns["llama.cpp"] = Turns([arguments.llama, "-c", LLAMA, str(gguf), *counts])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for number in range(arguments.rounds + 1):
        for name, process in turns.items():
            speeds = process.take()
            if number:  # the first is a warm-up
                found[name].append(speeds)
    for process in turns.values():
        process.close()
    rows = {}
    for name, taken in found.items():
        prefill, decode = zip(*taken, strict=True)
        rows[name] = {
            "prefill": {"median": statistics.median(prefill), "best": max(prefill)},
            "decode": {"median": statistics.median(decode), "best": max(decode)},
        }
    return {"size": size, "bits": bits, "prompt": arguments.prompt, "tokens_per_second": rows}


def rows_against_time(counts: list[int], bits: list[int]) -> dict[str, Any]:
    """Of products with 40 matrices of 5,120 x 1,280, by the number of rows, with the kernels and without."""
    found = {}
    for title, setting in (("native", "on"), ("without", "off")):
        lists = [",".join(map(str, numbers)) for numbers in (counts, bits)]
        command = [sys.executable, __file__, "--rows", lists[0], "--bits", lists[1], "--only-rows"]
        environment = {**os.environ, "OPENELM_MLX_NATIVE": setting}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found[title] = json.loads(done.stdout)
    return found


def time_rows(counts: list[int], bits: list[int]) -> dict[str, Any]:
    """The same in this process: microseconds of one matrix, and how fast its weights were read."""
    import time

    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_openelm.model.cpu_layers import CPUQuantizedLinear

    times: dict[str, Any] = {}
    for width in filter(None, bits):
        layers = [CPUQuantizedLinear(1280, 5120, bias=False, group_size=64, bits=width) for _ in range(40)]
        if os.environ["OPENELM_MLX_NATIVE"] != "off":  # MLX multiplies with scales of the input's type only
            for layer in layers:
                layer.set_dtype(mx.bfloat16)
        parameters: Any = tree_flatten([layer.parameters() for layer in layers])
        mx.eval(parameters)
        nbytes = sum(array.nbytes for _, array in parameters)
        for count in counts:
            x = mx.random.normal((count, 1280))
            mx.eval(x)
            best = float("inf")
            for _ in range(5):
                started = time.perf_counter()
                mx.eval([layer(x) for layer in layers])
                best = min(best, time.perf_counter() - started)
            times[f"{width} bits, {count} rows"] = {
                "microseconds": best / len(layers) * 1e6,
                "gb_per_second": nbytes / best / 1e9,
            }
    return times


def main() -> None:
    from mlx_openelm.machine.blas import load_fast_blas

    load_fast_blas()  # in every contestant alike, as the command line does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="270M,1.1B")
    parser.add_argument("--bits", default="0,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--contestants", default=CONTESTANTS)
    parser.add_argument("--rows", default="1,2,4,8,16,32")
    parser.add_argument("--llama", default=sys.executable)
    parser.add_argument("--gguf")
    parser.add_argument("--output", default=str(RESULTS / "native.json"))
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--only-rows", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestant(arguments.contestant, arguments.size, int(arguments.bits), arguments.prompt, arguments.tokens)
        return
    from mlx_openelm.machine.bandwidth import BandwidthProbe
    from mlx_openelm.machine.hardware import describe

    bits = [int(part) for part in arguments.bits.split(",")]
    counts = [int(part) for part in arguments.rows.split(",")]
    if arguments.only_rows:
        print(json.dumps(time_rows(counts, bits)))
        return
    cases = [measure(size, width, arguments) for size in arguments.sizes.split(",") for width in bits]
    for case in cases:
        print(f"{case['size']}, {case['bits'] or 'float32'}{' bits' if case['bits'] else ''}, {case['prompt']} tokens")
        for name, speeds in case["tokens_per_second"].items():
            each = [f"{kind} {s['median']:8.1f} (best {s['best']:.1f})" for kind, s in speeds.items()]
            print(f"  {name:14}", ", ".join(each), "tokens/s")
    curve = rows_against_time(counts, bits)
    memory = BandwidthProbe().sample(1.0)
    for name, found in curve["native"].items():
        share = f"{found['gb_per_second'] / memory * 1e9:.0%} of the bandwidth"
        print(
            f"{name}: {found['microseconds']:.0f} us, {share}; {curve['without'][name]['microseconds']:.0f} us without"
        )
    report = {"cases": cases, "rows": curve, "bandwidth_gb_per_second": memory / 1e9}
    hidden = {arguments.llama: "PYTHON", arguments.gguf: "FOLDER"}  # where they are on this machine
    given = [hidden.get(word, word) for word in sys.argv[1:]]
    report["machine"] = describe(shlex.join(["python", "benchmarks/native.py", *given]))
    Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
