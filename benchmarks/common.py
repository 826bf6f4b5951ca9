"""What the benchmarks share: models to measure with, processes that are timed in turn, and reports."""

import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_openelm import OpenELMConfig, load_model
from mlx_openelm.benchmark.measure import Spread
from mlx_openelm.machine.hardware import describe
from mlx_openelm.model.adapters import about_base, save_adapter
from mlx_openelm.model.lora import AdapterConfig, adapter_parameters, add_adapter
from mlx_openelm.model.openelm import parameter_shapes
from mlx_openelm.tensors import LazyTensor, write_safetensors

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """A process that succeeded."""

    seconds: float
    peak_bytes: int  # peak memory
    output: str


def run(command: Sequence[str | Path]) -> Run:
    """Run a program silently; if it fails, exit with the end of its output."""
    words = [str(word) for word in command]
    done = subprocess.run([sys.executable, "-S", "-c", _LAUNCHER, *words], capture_output=True, text=True, check=True)
    status, seconds, peak, text = json.loads(done.stdout)
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{text[-2000:]}")
    return Run(seconds, peak * (1 if sys.platform == "darwin" else 1024), text)


# A separate process, because Linux counts the memory of the process that starts a program in the program's peak.
_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
seconds = time.perf_counter() - start
print(json.dumps([done.returncode, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.stdout]))
"""


def in_turn(contestants: dict[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Measure A B A B ..., so that other load on the machine affects both; the warm-up rounds do not count."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warm_up + rounds):
        for name, measure in contestants.items():
            figure = measure()
            if number >= warm_up:
                figures[name].append(figure)
                print(f"  round {number - warm_up + 1}: {name} {figure:,.3f}", file=sys.stderr)
    return figures


def summary(figures: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and number of rounds."""
    return {**asdict(Spread.of(figures)), "rounds": len(figures)}


def report(name: str, rows: Sequence[Sequence[Any]], figures: dict[str, Any]) -> None:
    """Print a table and one JSON line, and save the JSON under `results/`."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    result = {"benchmark": name, **figures, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def machine() -> dict[str, Any]:
    """The machine, and the code and command that ran; of absolute paths, only the names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return describe(" ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]))


@contextmanager
def model_folder(size: str, dtype: mx.Dtype = mx.float32) -> Iterator[Path]:
    """A temporary Hugging Face folder with a published model's shape, random weights, and a tokenizer."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"OpenELM-{size.replace('.', '_')}"
        folder.mkdir()
        write_random_model(folder, OpenELMConfig.preset(size), dtype)
        yield folder


def write_model_and_adapter(folder: Path, config: OpenELMConfig, adapter: AdapterConfig) -> None:
    """A random model in `model/`, and a new LoRA adapter for it in `adapter/`."""
    (folder / "model").mkdir()
    write_random_model(folder / "model", config)
    model = load_model(folder / "model")
    add_adapter(model, adapter)
    (folder / "adapter").mkdir()
    save_adapter(folder / "adapter", adapter_parameters(model), "lora", adapter, about_base("random", config))


def write_random_model(folder: Path, config: OpenELMConfig, dtype: mx.Dtype = mx.float32) -> None:
    """Random weights by a fixed recipe (see `tests/golden/full_size.json`), one tensor in memory at a time."""
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    last: dict[str, mx.array] = {}  # a tensor is created whole and written in blocks

    def read_rows(name: str, shape: tuple[int, ...], start: int, stop: int) -> mx.array:
        if name not in last:
            last.clear()
            last[name] = random_tensor(name, shape, config).astype(dtype)
        return last[name][start:stop]

    tensors = {
        name: LazyTensor(shape, dtype, partial(read_rows, name, shape))
        for name, shape in parameter_shapes(config).items()
    }
    with open(folder / "model.safetensors", "wb") as file:
        write_safetensors(file, tensors, {"format": "pt"})
    _write_tokenizer(folder, config.vocab_size)


def random_tensor(name: str, shape: tuple[int, ...], config: OpenELMConfig) -> mx.array:
    """A tensor by the fixed recipe, float32."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return mx.array(1 + np.float32(0.1) * values)
    std = config.model_dim**-0.5
    if name.endswith(("qkv_proj.weight", "proj_1.weight")):
        std = shape[1] ** -0.5
    elif name.endswith(("out_proj.weight", "proj_2.weight")):
        std *= (2 * config.num_transformer_layers) ** -0.5
    return mx.array(values * np.float32(std))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A SentencePiece model with a word for every id, because random weights generate any id."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    text = (ROOT / "LICENSE").read_text() + (ROOT / "pyproject.toml").read_text()
    (folder / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name in ("text.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    for number in range(len(model.pieces), vocab_size):
        model.pieces.add(piece=f"▁word{number}", score=-number)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
