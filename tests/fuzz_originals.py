"""One small, sound file of every kind that is read, each in a folder where a command or the library finds it."""

import csv
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import yaml
from mlx.utils import tree_flatten

from conftest import ADAPTED_CONFIG, GOLDEN, random_model, write_folder
from mlx_openelm import PromptCache, TuneRecipe, convert, load, tune
from mlx_openelm.conversion.adapters.forms import convert_adapter
from mlx_openelm.model.adapters import about_base, save_adapter
from mlx_openelm.model.lora import AdapterConfig, adapter_parameters, add_adapter

CONFIG = replace(ADAPTED_CONFIG, vocab_size=400)
RECORDS = [{"prompt": f"What is {n}?", "completion": f"It is {n} of them."} for n in range(8)]
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{ '<|' + message['role'] + '|>' + message['content'] | trim }}{% endfor %}
{% if add_generation_prompt %}answer: {% endif %}"""
TEXTS = [f"The fox number {n} went to the river {'and slept ' * (n % 5)}." for n in range(60)]
CORENET_YAML = {"model": {"language_modeling": {"general_gpt": {"model_name": "OpenELM-270M", "vocab_size": 400}}}}
PRETRAIN = {
    "model": {
        "num_transformer_layers": 2,
        "model_dim": 32,
        "head_dim": 8,
        "num_gqa_groups": 2,
        "ffn_dim_divisor": 16,
        "vocab_size": 400,
        "max_context_length": 32,
    },
    "data": [{"path": "corpus.txt", "weight": 2.0}],
    "tokenizer": "tokenizer.model",
    "steps": 2,
    "batch_size": 2,
    "sequence_length": 16,
    "warmup_steps": 1,
    "dtype": "float32",
}


TASK = {
    "name": "ours",
    "version": "1",
    "data": {"files": {"test": "test.jsonl", "train": "train.parquet"}},
    "fields": {"question": "text", "choices.text": "texts", "choices.label": "texts", "key": "text", "n": "label"},
    "description": "About {{ topic }}.\n",
    "prompt": "{% for part in question.split(' ') %}{{ part | upper }} {% endfor %}\n{{ n + 1 }}:",
    "choices": "choices.text",
    "num_choices": [2, 4],
    "labels": "choices.label",
    "gold": "key",
    "shots": {"default": 2, "skip_equal": True},
    "metrics": ["acc", "acc_norm"],
    "paper": {"version": "0", "prompt": "{{ question }}"},
}


def write_originals(root: Path, tokenizer) -> Path:
    """Write all folders below `root`."""
    network = random_model(CONFIG)
    raw = write_folder(root / "raw", network, tokenizer)
    convert(raw, root / "model", dtype="float32")
    convert(raw, root / "quantized", quantize=4, group_size=32)
    shutil.copytree(raw, root / "sharded")
    _split(root / "sharded", network)
    shutil.copytree(root / "model", root / "fast")
    (root / "fast" / "tokenizer.model").unlink()
    _adapters(root, network)
    _data(root, tokenizer)
    _tasks(root)
    _outputs(root, tokenizer)
    shutil.copytree(GOLDEN / "untied_mha_noglu", root / "corenet")
    shutil.copytree(root / "model", root / "chat")
    (root / "chat" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copytree(root / "data", root / "pretraining")
    convert(raw, root / "written", dtype="float32")
    (root / "written" / "precious.txt").write_text("not ours")
    (root / "corenet" / "train.yaml").write_text(yaml.safe_dump(CORENET_YAML))
    return root


def _split(folder, network):
    tensors = dict(tree_flatten(network.parameters()))
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in inside}, {"format": "pt"})
    where = {name: file for file, inside in parts.items() for name in inside}
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "model.safetensors").unlink()


def _adapters(root, network):
    config = AdapterConfig("lora", rank=2, alpha=4.0)
    add_adapter(network, config, 0)
    mx.random.seed(1)
    values = {name: 0.1 * mx.random.normal(array.shape) for name, array in adapter_parameters(network).items()}
    (root / "lora").mkdir()
    save_adapter(root / "lora", values, "lora", config, about_base("model", CONFIG))
    convert_adapter(root / "lora", root / "peft", to="peft")


def _tasks(root):
    import pyarrow
    import pyarrow.parquet

    folder = root / "tasks"
    folder.mkdir()
    rows = [
        {"question": text, "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "key": "B", "n": str(n)}
        for n, text in enumerate(TEXTS[:8])
    ]
    values = {**TASK, "name": "ours/{variant}", "variants": {"one": {"documents": 8}, "two": {"num_choices": 3}}}
    (folder / "task.yaml").write_text(yaml.safe_dump(values))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")


def _data(root, tokenizer):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    folder = root / "data"
    folder.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (folder / "records.jsonl").write_text(lines)
    (folder / "records.json").write_text(json.dumps(RECORDS, indent=1))
    (folder / "records.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with open(folder / "records.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(RECORDS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "records.parquet")
    texts = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(texts))
    (folder / "texts.jsonl.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(texts))
    (folder / "corpus.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text[:20]}) + "\n" for text in TEXTS[:6]))
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(PRETRAIN))
    tuning = {"model": "../model", "data": "records.jsonl", "steps": 2, "batch_size": 2, "rank": 2, "alpha": 4.0}
    (folder / "tune.yaml").write_text(yaml.safe_dump(tuning))


def _outputs(root, tokenizer):
    recipe = TuneRecipe(
        model=str(root / "model"), data=str(root / "data" / "records.jsonl"), steps=2, checkpoint_every=1, log_every=1,
        batch_size=2, rank=2, validate_every=1, validation="0.3",
    )  # fmt: skip
    tune(recipe, root / "run")
    (root / "run.yaml").write_text(yaml.safe_dump({**recipe.to_dict(), "steps": 2}))
    model, _ = load(root / "model")
    cache = PromptCache(model)
    tokens = tokenizer.encode("Once upon a time there was a small fox")
    mx.eval(model(mx.array([tokens]), cache.kv))
    cache.hold(tokens)
    (root / "cache").mkdir()
    cache.save(root / "cache" / "prompt.safetensors")
