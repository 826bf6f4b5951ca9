"""What `import mlx_openelm` offers: names, signatures, and results that print well."""

import ast
import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_openelm
from conftest import SMALL_CONFIG, random_model, write_folder
from mlx_openelm import (
    Case,
    Chat,
    PretrainRecipe,
    TrainingCallback,
    TrainingResult,
    TuneRecipe,
    average,
    bench,
    convert,
    load,
    merge,
    pretrain,
    tune,
)
from mlx_openelm.errors import BenchError, DataError, TrainingError

PUBLIC = {name: getattr(mlx_openelm, name) for name in mlx_openelm.__all__ if not name.startswith("__")}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}


def signatures():
    """Every public function and method, by name."""
    yield from FUNCTIONS.items()
    for name, thing in CLASSES.items():
        for attribute, value in vars(thing).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if inspect.isfunction(function) and (attribute == "__init__" or not attribute.startswith("_")):
                yield f"{name}.{attribute}", function


def test_type_checkers_and_python_see_the_same_names():
    tree = ast.parse(Path(mlx_openelm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    for_checkers = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert for_checkers == mlx_openelm._MODULE_OF
    assert set(mlx_openelm.__all__) == {"__version__", *for_checkers}
    assert set(mlx_openelm.__all__) <= set(dir(mlx_openelm))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mlx_openelm' has no attribute 'nonsense'"):
        mlx_openelm.nonsense  # noqa: B018


def test_no_module_has_the_name_of_a_public_function():
    modules = {path.stem for path in Path(mlx_openelm.__file__).parent.iterdir() if path.name[0] not in "._"}
    assert modules.isdisjoint(FUNCTIONS)


def test_importing_one_function_does_not_load_the_modules_of_all():
    code = "import sys, mlx_openelm; mlx_openelm.SamplingConfig; print('mlx_openelm.training.run' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(("name", "function"), list(signatures()))
def test_signatures_can_be_read(name, function):
    assert "<lambda>" not in str(inspect.signature(function)), name
    hints = typing.get_type_hints(function)
    made_by_us = name.endswith("__init__")  # folders of results are given out, not taken
    for parameter in () if made_by_us else inspect.signature(function).parameters.values():
        if "path" in parameter.name or parameter.name in ("folder", "output", "checkpoint"):
            accepted = typing.get_args(hints[parameter.name]) or (hints[parameter.name],)
            assert Path not in accepted or str in accepted, f"{name}: {parameter.name} takes no str"


def types_in(hint):
    """All classes that a type hint mentions."""
    if inspect.isclass(hint) and not typing.get_args(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from types_in(part) if not isinstance(part, list) else (t for one in part for t in types_in(one))


@pytest.mark.parametrize(("name", "function"), list(signatures()))
def test_every_type_in_a_signature_is_public(name, function):
    for hint in typing.get_type_hints(function).values():
        for found in types_in(hint):
            if found.__module__.startswith("mlx_openelm"):
                assert found.__name__ in PUBLIC, f"{name} uses {found.__module__}.{found.__name__}"


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("package")
    write_folder(place / "model", random_model(SMALL_CONFIG), tokenizer)
    records = [{"prompt": f"{number} and", "completion": f" {number + 1}."} for number in range(12)]
    (place / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (place / "story.txt").write_text("\n<|endoftext|>\n".join(f"The fox read {n} books." for n in range(40)))
    return place


class Heard(TrainingCallback):
    def __init__(self):
        self.calls = []

    def on_prepared(self, num_steps):
        self.calls.append(("prepared", num_steps))

    def on_step(self, metrics):
        self.calls.append(("step", metrics.step))

    def on_metrics(self, metrics):
        self.calls.append(("metrics", metrics.step))

    def on_message(self, message):
        self.calls.append(("message", message))


def tune_recipe(files, **changes):
    settings = {"model": files / "model", "data": files / "data.jsonl", "dtype": "float32", "rank": 2, "steps": 3}
    return TuneRecipe(**{**settings, "validation": 0.25, "log_every": 2, **changes})


def test_tune_returns_the_adapter_and_what_it_reached(files, tmp_path):
    heard = Heard()
    result = tune(tune_recipe(files), tmp_path / "adapter", callback=heard)
    assert heard.calls == [
        ("prepared", 3),
        ("metrics", 0),
        ("step", 1),
        ("step", 2),
        ("metrics", 2),
        ("step", 3),
        ("metrics", 3),
    ]
    assert (result.folder, result.stopped_early, result.metrics.step) == (tmp_path / "adapter", False, 3)
    assert result.checkpoint.name == f"step-{result.step:08d}"
    assert result.validation_loss == result.metrics.validation_loss
    assert repr(result).startswith(f"TrainingResult('{tmp_path / 'adapter'}': step 3, validation loss ")
    model, _ = load(files / "model", adapter=str(result.folder))
    assert model is not None
    again = tune(tune_recipe(files), str(tmp_path / "adapter"), resume=True)
    assert (again.metrics, again.step, again.stopped_early) == (None, 3, False)
    with pytest.raises(TrainingError, match="already contains checkpoints"):
        tune(tune_recipe(files), tmp_path / "adapter")


def test_a_result_prints_in_a_process_that_does_not_see_the_checkpoint(tmp_path):
    result = TrainingResult(tmp_path, None, None, None, None, False, None)
    assert repr(result) == f"TrainingResult('{tmp_path}': its checkpoint is in another process's folder)"


def test_tune_says_that_it_stopped_early(files, tmp_path):
    recipe = tune_recipe(files, learning_rate=5.0, steps=30, validate_every=1, early_stop=2, max_grad_norm=0.0)
    result = tune(recipe, tmp_path / "adapter")
    assert result.stopped_early
    assert result.step < result.metrics.step < 30


def test_pretrain_returns_a_model_folder(files, tmp_path):
    recipe = PretrainRecipe(
        model=SMALL_CONFIG,
        data=str(files / "story.txt"),
        train_tokenizer=300,
        sequence_length=16,
        steps=2,
        batch_size=2,
        warmup_steps=0,
        dtype="float32",
    )
    result = pretrain(recipe, tmp_path / "run")
    model, tokenizer = load(result.checkpoint)
    assert (result.step, model.config, tokenizer.vocab_size) == (2, SMALL_CONFIG, 300)
    with pytest.raises(DataError, match="no data"):
        pretrain(PretrainRecipe(model="270M"), tmp_path / "other")


def test_merge_average_and_convert_return_what_they_wrote(files, tmp_path):
    tune(tune_recipe(files, steps=1), tmp_path / "adapter")
    merged = merge(files / "model", tmp_path / "adapter", str(tmp_path / "merged"))
    assert merged.num_merged == 8
    assert repr(merged).startswith("Merge(")
    averaged = average([files / "model", tmp_path / "merged"], tmp_path / "average")
    assert averaged.dtype == "float32"
    converted = convert(files / "model", tmp_path / "converted", quantize=4, group_size=32)
    assert repr(converted).startswith(f"Conversion('{tmp_path / 'converted'}': 31,424 parameters in 4-bit affine, ")


def test_bench_measures_a_network(tiny_model):
    rounds = []
    case = Case(prompt_tokens=4, max_tokens=3)
    report = bench(tiny_model, [case], rounds=1, on_round=lambda who, number: rounds.append((who, number)))
    assert rounds == [("openelm-mlx", 0), ("openelm-mlx", 1)]
    assert report.results[0].case == case
    assert "Case(4 prompt tokens, 3 generated, 1 at once, full KV cache): openelm-mlx " in repr(report)
    with pytest.raises(BenchError, match="`against` must be mlx-lm; got 'torch'"):
        bench(tiny_model, against="torch")
    with pytest.raises(BenchError, match="`rounds` must be from 1 to 10,000; got 0"):
        bench(tiny_model, [case], rounds=0)


def test_models_and_tokenizers_print_in_a_line(tiny_model, tokenizer, chat_tokenizer):
    size = f"{tiny_model.config.num_parameters:,}"
    assert repr(tiny_model) == f"OpenELM({size} parameters in float32, 3 layers, model_dim 128)"
    assert repr(tokenizer) == f"Tokenizer('{tokenizer.path}', 400 tokens, no chat template)"
    chat = Chat(tiny_model, chat_tokenizer, system="Be brief.", max_tokens=2)
    assert repr(chat) == f"Chat({tiny_model!r}, 1 messages, 0 tokens in the cache)"
    assert repr(chat.cache) == "PromptCache(0 tokens, full)"
    cache = tiny_model.make_cache()
    tiny_model(mx.array([[1, 2, 3]]), cache=cache)
    assert repr(cache).startswith("KVCache(3 tokens, full, ")
