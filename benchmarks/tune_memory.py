"""Does tuning take the memory that `--dry-run` predicts?

Tunes random models in several ways for a few steps, each in a separate process, and compares the peak of MLX's arrays
with the prediction. The models are layer-wise, with widths that the factors were not fitted to.

python benchmarks/tune_memory.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import report

from mlx_openelm import OpenELMConfig, load
from mlx_openelm.conversion.convert import convert
from mlx_openelm.tokenizer.files import write_tokenizer
from mlx_openelm.training.memory import tuning_memory
from mlx_openelm.training.pretrain import initial_parameters
from mlx_openelm.training.pretrain_recipe import PretrainRecipe
from mlx_openelm.training.tune import make_trainer, prepare_tuning
from mlx_openelm.training.tune_recipe import TuneRecipe

CASES: dict[str, dict] = {
    "lora": {},
    "lora, checkpointing": {"gradient_checkpointing": True},
    "dora": {"method": "dora"},
    "dora, checkpointing": {"method": "dora", "gradient_checkpointing": True},
    "full": {"method": "full"},
    "full, checkpointing": {"method": "full", "gradient_checkpointing": True},
    "full, one short row": {"method": "full", "batch_size": 1, "max_length": 32},
    "answers only": {"train_on": "completion"},
    "packed": {"pack": True, "gradient_checkpointing": True},
    "4 bits": {"bits": 4},
    "4 bits, checkpointing": {"bits": 4, "gradient_checkpointing": True},
    "long rows, checkpointing": {"batch_size": 1, "max_length": 2048, "gradient_checkpointing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one_case(CASES[arguments.one[0]], Path(arguments.one[1]))
        return
    rows = [["", "predicted", "measured", "off by"]]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in CASES:
            done = subprocess.run([sys.executable, __file__, "--one", name, folder], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            error = found["predicted"] / found["measured"] - 1
            figures[name] = {**found, "error": error}
            rows.append(
                [name, *(f"{found[key] / 2**20:,.0f} MiB" for key in ("predicted", "measured")), f"{error:+.0%}"]
            )
    report("tune_memory", rows, figures)


def prepare(folder: Path) -> None:
    """Write a random layer-wise model with the built-in one's vocabulary, in full and in 4 bits, and texts."""
    tokenizer = load()[1]
    config = OpenELMConfig.layerwise(6, 384, 64, num_gqa_groups=2, ffn_dim_divisor=64, vocab_size=4096)
    (folder / "model").mkdir()
    parameters = initial_parameters(PretrainRecipe(model=config))
    mx.save_safetensors(str(folder / "model" / "model.safetensors"), parameters, {"format": "mlx"})
    (folder / "model" / "config.json").write_text(json.dumps(config.to_dict()))
    write_tokenizer(tokenizer, folder / "model")
    convert(folder / "model", folder / "bits", quantize=4, dtype="float32")
    words = np.random.default_rng(0).choice(["river", "fox", "house", "old", "ran"], 4000)
    lines = [{"prompt": " ".join(words[: 1500 + n]), "completion": " ".join(words[:100])} for n in range(8)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    short = [{"prompt": " ".join(words[:300]), "completion": " ".join(words[:40])} for n in range(8)]
    (folder / "short.jsonl").write_text("".join(json.dumps(line) + "\n" for line in short))


def one_case(case: dict, folder: Path) -> None:
    """Print the predicted and the measured peak of a few steps."""
    case = {"train_on": "all", "max_length": 512, **case}
    bits = case.pop("bits", None)
    data = folder / ("short.jsonl" if case["train_on"] == "completion" else "texts.jsonl")
    recipe = TuneRecipe(
        model=str(folder / ("bits" if bits else "model")),
        data=str(data),
        steps=5,
        batch_size=4 if "batch_size" not in case else case.pop("batch_size"),
        dtype="float32",
        **case,
    )
    tuning = prepare_tuning(recipe)
    predicted = tuning_memory(tuning).peak_bytes
    trainer = make_trainer(tuning)
    trainer.take_step()
    mx.clear_cache()
    mx.reset_peak_memory()
    for _ in range(2):
        trainer.take_step()
    print(json.dumps({"predicted": predicted, "measured": mx.get_peak_memory()}))


if __name__ == "__main__":
    main()
