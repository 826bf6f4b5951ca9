"""A process that reads damaged files: one line of JSON per job on stdin, one answer on stdout.

A job is a folder and a reader of the library, or the words of a command. The answer says how it ended ("done",
"refused", or "crashed" and where in this package), what came out, and by how many bytes memory grew at its highest.
"""

import gc
import hashlib
import json
import os
import resource
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_openelm
from mlx_openelm import OpenELMError, PromptCache, Tokenizer, load
from mlx_openelm.conversion.read.config import read_config_file
from mlx_openelm.data.corpus import CorpusBatches, Filters, prepare_corpus
from mlx_openelm.data.dataset import read_examples
from mlx_openelm.data.text_files import TextSource, read_documents
from mlx_openelm.evaluation.prompts import items
from mlx_openelm.evaluation.suites import find_tasks
from mlx_openelm.evaluation.task import PROTOCOLS
from mlx_openelm.evaluation.task_data import read_task_data
from mlx_openelm.generation.prompt_file import read_prompts
from mlx_openelm.runs import read_metrics
from mlx_openelm.training.checkpoints import load_checkpoint
from mlx_openelm.training.pretrain_recipe import PretrainRecipe
from mlx_openelm.training.tune_recipe import TuneRecipe

TOKENS = mx.array([[1, 9, 38, 100, 301, 7]])
TEXT = "Once upon a time, the fox\nread 3 books: <s> é日 </s>"
MEMORY = 6 << 30  # bytes of address space beyond what is in use at the start


def digest(array) -> str:
    values = np.array(array.astype(mx.float32))
    assert np.isfinite(values).all(), "a result is not finite"
    return hashlib.sha256(values.tobytes()).hexdigest()


def model(folder: Path, adapter=None):
    network, tokenizer = load(folder, adapter=adapter)
    return {"logits": digest(network(TOKENS)), **ids(tokenizer)}


def ids(tokenizer):
    tokens = tokenizer.encode(TEXT)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens), "an id is out of range"
    assert isinstance(tokenizer.decode(tokens), str)
    return {"tokens": tokens}


def prompt_cache(folder: Path):
    network, _ = load(folder.parent / "model")
    cache = PromptCache.load(network, folder / "prompt.safetensors")
    assert all(type(token) is int for token in cache.tokens), "a token is not an integer"
    return {"tokens": cache.tokens, "logits": digest(network(TOKENS, cache.kv))}


def examples(path: Path):
    tokenizer = Tokenizer(path.parent / "tokenizer.model")
    found = read_examples(path, tokenizer)
    return [tokenizer.decode(list(map(int, example.tokens))) for example in found.examples]


def prompts(path: Path):
    return [prompt.tokens for prompt in read_prompts(path, Tokenizer(path.parent / "tokenizer.model"), chat=False)]


def corpus(folder: Path):
    """Rows from the token files of an earlier run, which are made here if they are missing."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    made = prepare_corpus([TextSource(str(folder / "corpus.txt"))], tokenizer, Filters(), folder / "tokens")
    batches = CorpusBatches(made, 2, 16, "stream", 0)
    rows = [batches.step(step).tokens for step in range(4)]
    assert all((row >= 0).all() and (row < tokenizer.vocab_size).all() for row in rows), "an id is out of range"
    return [row.tolist() for row in rows]


def checkpoint(folder: Path):
    found = load_checkpoint(folder / "checkpoints" / "step-00000002")
    return {name: digest(array) for name, array in found.parameters.items()}


def metrics(folder: Path):
    return read_metrics(folder)


def recipe(path: Path):
    kind = PretrainRecipe if path.name.startswith("pretrain") else TuneRecipe
    return json.loads(json.dumps(kind.from_file(path).to_dict(), default=str))


def prompts_of_tasks(folder: Path):
    """All requests of the tasks in a file, in both protocols."""
    found = []
    for task in find_tasks([str(folder / "task.yaml")]):
        data = read_task_data(task)
        for protocol in PROTOCOLS:
            found.append([item.requests for item in items(task, data, protocol=protocol)])
    return found


READERS = {
    "model": model,
    "adapted": lambda folder: model(folder.parent / "model", folder),
    "corenet": lambda folder: {
        "logits": digest(
            mlx_openelm.load_model(folder / "corenet_checkpoint.pt", config=folder / "config.json")(TOKENS[:, :2])
        )
    },
    "yaml": lambda path: read_config_file(path).to_dict(),
    "tokenizer": lambda path: ids(Tokenizer(path)),
    "cache": prompt_cache,
    "examples": examples,
    "documents": lambda path: list(read_documents(path)),
    "prompts": prompts,
    "corpus": corpus,
    "checkpoint": checkpoint,
    "metrics": metrics,
    "recipe": recipe,
    "tasks": prompts_of_tasks,
}


def command(words: list[str]):
    """Run a command as `openelm-mlx` does; its output is that of this process."""
    from mlx_openelm.cli import main

    sys.argv = ["openelm-mlx", *words]
    status = 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        kept = [os.dup(number) for number in range(3)]
        for number, file in enumerate((nothing, out, err)):
            os.dup2(file.fileno(), number)
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, file in enumerate(kept):
                os.dup2(file, number)
                os.close(file)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    control = {c for text in texts for c in text if (ord(c) < 32 and c not in "\n\t\r") or 0x7F <= ord(c) < 0xA0}
    assert not control, f"raw control characters: {control}"
    errors = [line for line in texts[1].splitlines() if line.startswith("openelm-mlx: error: ")]
    assert status in (0, 2), f"status {status}: {texts[1][-500:]}"
    assert len(errors) == (status == 2), texts[1][-500:]
    if status == 2:
        raise OpenELMError(errors[0])
    return


def reset_peak() -> int:
    """Begin to measure the highest memory anew; gives what is in use now, in bytes."""
    gc.collect()
    mx.clear_cache()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return memory("VmRSS")


def memory(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return 0


def answer(job):
    before = reset_peak()
    result = error = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = command(job["words"]) if "words" in job else READERS[job["reader"]](Path(job["path"]))
        ended = "done"
    except OpenELMError as refusal:
        ended, error = "refused", str(refusal)
    except BaseException as failure:
        frames = traceback.extract_tb(failure.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "mlx_openelm" in frame.filename]
        what = traceback.format_exception_only(failure)[-1].strip()
        ended, error = "crashed", f"{what[:1000]} (at {' '.join(ours[-4:])})"
    grown = memory("VmHWM") - before if before else 0
    return {"ended": ended, "result": result, "error": error, "bytes": grown}


def main() -> None:
    mx.set_cache_limit(0)
    gc.freeze()  # what is imported need not be looked at again for every job
    answers = os.fdopen(os.dup(1), "w")
    if sys.platform == "linux":
        limit = memory("VmSize") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line)), default=str), file=answers, flush=True)


if __name__ == "__main__":
    main()
