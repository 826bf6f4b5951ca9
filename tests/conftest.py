"""Small models and tokenizers that tests share; nothing here needs a network, a GPU or published weights."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_openelm import OpenELM, OpenELMConfig, Tokenizer
from mlx_openelm.evaluation.items import Item
from mlx_openelm.evaluation.metrics import grade
from mlx_openelm.evaluation.requests import Request, Score
from mlx_openelm.files.output import output_file
from mlx_openelm.model.lora import AdapterConfig

os.environ["MLX_ENABLE_TF32"] = "0"  # full float32 on every GPU; MLX reads it at the first product, commands inherit it
os.environ["OPENELM_MLX_BLAS"] = "off"  # commands compute as this process does, to compare the two to the bit

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = ["tied_gqa2", "untied_mha_noglu"]

SMALL_CONFIG = OpenELMConfig.layerwise(
    num_transformer_layers=2,
    model_dim=32,
    head_dim=8,
    num_gqa_groups=2,
    ffn_dim_divisor=16,
    vocab_size=400,
    max_context_length=64,
)

ADAPTED_CONFIG = OpenELMConfig.layerwise(
    num_transformer_layers=2,
    model_dim=64,
    head_dim=32,
    qkv_multipliers=(1.0, 2.0),
    num_gqa_groups=2,
    ffn_multipliers=(1.0, 2.0),
    ffn_dim_divisor=64,
    vocab_size=96,
    max_context_length=64,
)
ADAPTER_TOKENS = np.random.default_rng(0).integers(3, 96, (2, 17)).astype(np.int32)
ADAPTERS = {
    "lora": AdapterConfig("lora", 4, 8.0),
    "rslora": AdapterConfig("lora", 4, 8.0, rank_stabilized=True),
    "dora": AdapterConfig("dora", 4, 8.0),
}

_SENTENCES = """Once upon a time there was a small fox who lived in an old garden behind a red house.
Every morning the fox went down to the river, where the water was cold and the stones were round.
She said: "I will learn to read!" and her brother laughed, for nobody there had ever seen a book.
In 1923 the river rose by 3.14 metres; the garden, the house & the fence were gone (all of them).
But they built another one, with more windows, and they lived there for many quiet years.
def add(x, y): return x + y  # a line of code, with_underscores and [brackets] {too}
"""


class FixedProbe:
    """A probe of the memory that found this speed, in bytes per second; counts its samples."""

    def __init__(self, best):
        self.best = best
        self.samples = 0

    def sample(self, seconds=0.0):
        self.samples += 1
        return self.best


def graded(likelihoods, golds=None, metrics=("acc", "acc_norm"), start=0, is_truncated=False, prompt="question"):
    """Results of made-up items with these log-likelihoods of their choices, the first of which are right."""
    found = []
    for number, of in enumerate(likelihoods):
        choices = tuple(f"choice {place}" for place in range(len(of)))
        requests = tuple(Request(f"{prompt} {start + number}:", f" {choice}") for choice in choices)
        item = Item(start + number, requests, choices, (0,) if golds is None else golds[number])
        found.append(grade(item, [Score(float(value), False, is_truncated) for value in of], metrics))
    return found


def assert_close(found, expected, atol):
    """Arrays of one shape whose largest difference is at most `atol`; says how large it was."""
    found = np.array(found.astype(mx.float32) if isinstance(found, mx.array) else found)
    expected = np.array(expected.astype(mx.float32) if isinstance(expected, mx.array) else expected)
    assert found.shape == expected.shape
    difference = float(np.abs(found - expected).max())
    assert difference <= atol, f"differs by {difference:.3g}, allowed is {atol:.3g}"


def random_model(config, seed=0):
    """A model with random weights, norms included: a forgotten norm shows."""
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def fresh(name, array):
        if "norm" in name:
            return 1 + 0.1 * mx.random.normal(array.shape, key=next(keys))
        return mx.random.normal(array.shape, key=next(keys)) * array.shape[-1] ** -0.5

    model = OpenELM(config)
    model.update(tree_map_with_path(fresh, model.parameters()))
    mx.eval(model.parameters())
    return model


def write_folder(folder, model, tokenizer=None, dtype=mx.float32):
    """A model folder in the Hugging Face layout, as a user brings one."""
    folder.mkdir(parents=True)
    config = {key: value for key, value in model.config.to_dict().items() if key != "tie_word_embeddings"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: array.astype(dtype) for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    if tokenizer is not None:
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    return folder


def train_sentencepiece(folder, text, **options):
    """Trains a SentencePiece model on a text; returns its path. By default it is like Llama's: BPE, byte fallback."""
    import sentencepiece

    (folder / "text.txt").write_text(text)
    defaults = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **{**defaults, **options},
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    """A SentencePiece model built like Llama's: BPE with byte fallback and no normalisation of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_sentencepiece(folder, _SENTENCES * 3, vocab_size=400, split_digits=True)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path, chat_template="openelm")


@pytest.fixture(scope="session")
def tiny_config():
    """Three layers of unequal widths, all of them multiples of every group size."""
    return OpenELMConfig.layerwise(
        num_transformer_layers=3,
        model_dim=128,
        head_dim=64,
        qkv_multipliers=(1.0, 3.0),
        num_gqa_groups=2,
        ffn_multipliers=(1.0, 3.0),
        ffn_dim_divisor=128,
        vocab_size=400,
        max_context_length=256,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    return random_model(tiny_config)


@pytest.fixture
def tiny_folder(tmp_path, tiny_model, tokenizer):
    return write_folder(tmp_path / "tiny", tiny_model, tokenizer)


def run(*arguments, stdin=None, **environment):
    """A command as people type it: exit status, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_openelm", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **environment},
        timeout=120,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def draw(function, what, path):
    """A picture in a file."""
    with output_file(path) as picture:
        function(what, picture)


def launched(processes):
    """The words before a command that start it in several processes, on ports that no other test listens on."""
    if processes == 1:
        return []
    port = _free_ports(processes)
    launcher = Path(sys.executable).with_name("mlx.launch")
    return [str(launcher), "-n", str(processes), "--backend", "ring", "--starting-port", str(port), "--"]


def _free_ports(count):
    """The first of some free ports in a row."""
    while True:
        first = random.randrange(20_000, 60_000)
        with ExitStack() as sockets:
            try:
                for port in range(first, first + count):
                    sockets.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first


def killed_at(words, step):
    """Kill all processes of a run without warning once it wrote of a step; gives the step that it got to."""
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    reached = 0
    while reached < step:
        line = process.stderr.readline()
        assert line, "the run ended before it was killed"
        found = re.search(r"step (\d+) of", line)
        reached = int(found[1]) if found else reached
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return reached


def refused(*arguments, **options):
    """The one line that a mistake gets."""
    status, out, err = run(*arguments, **options)
    assert (status, out) == (2, ""), (status, out, err)
    assert err.startswith("openelm-mlx: error: ")
    assert err.count("\n") == 1
    return err


def heard(messages=None, **events):
    """A callback that collects the messages of a training run, or calls functions by the names of events."""
    from mlx_openelm import TrainingCallback

    callback = TrainingCallback()
    for name, function in {**events, **({} if messages is None else {"on_message": messages.append})}.items():
        setattr(callback, name, function)
    return callback


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, tokenizer):
    from mlx_openelm.data.corpus import Filters, prepare_corpus
    from mlx_openelm.data.text_files import TextSource

    folder = tmp_path_factory.mktemp("corpus")
    documents = [f"The fox number {n} went to the river {'and slept ' * (n % 5)}." for n in range(300)]
    (folder / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    return prepare_corpus([TextSource(str(folder / "a.txt"))], tokenizer, Filters(), folder / "cache")


@pytest.fixture(scope="session")
def recipe():
    """A short pre-training run."""
    from mlx_openelm.training.pretrain_recipe import PretrainRecipe

    return PretrainRecipe(
        model=replace(SMALL_CONFIG, max_context_length=32),
        steps=12,
        batch_size=4,
        sequence_length=16,
        learning_rate=0.01,
        warmup_steps=4,
        dtype="float32",
        log_every=1,
        validate_every=6,
        checkpoint_every=3,
        validation_rows=4,
    )
