"""Measures openelm-tiny and writes its card: held-out loss next to the first model's and a 5-gram's, unedited samples.

python benchmarks/tiny_card.py --run runs/tiny --full AVERAGED_MODEL --data CORPUS
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import RESULTS, machine
from ngram import KneserNey

from mlx_openelm import OpenELM, SamplingConfig, Tokenizer, generate, load, load_model
from mlx_openelm.data.corpus import Corpus, Filters, TokenizedDataset, prepare_corpus, validation_rows
from mlx_openelm.data.text_files import TextSource
from mlx_openelm.hub import BUILT_IN_MODEL, model_folder
from mlx_openelm.training.pretrain_recipe import RECIPES, PretrainRecipe

FOLDER = model_folder(BUILT_IN_MODEL)
SAMPLING = SamplingConfig(temperature=0.5, top_p=0.9, repetition_penalty=1.1, seed=0)
ANSWER_TOKENS = 80
LINE_BREAKS = re.compile(r"\s*\n\s*")  # a table cell has one line

# The files that the first model's documents were held out from; a document is held out by a hash of its text.
PARTS = {
    "simple stories (TinyStories, African Storybook)": (
        "tinystories_v1_part.txt",
        "tinystories_v2_gpt4_part.txt",
        "african_storybook_*.txt",
    ),
    "fairy tales, fables, children's classics": ("fairytales_*.txt", "fables_*.txt", "children_*.txt"),
    "longer children's books": ("novel_*.txt",),
}
FIRST = RESULTS / "tiny_card_first.json"  # of the first openelm-tiny, 4,788,224 parameters

PROMPTS = (
    "Once upon a time there was",
    "Once upon a time, there was a little girl named",
    "One day, a little dog",
    "The cat sat on",
    "Tom and Lily went to the park. They saw",
    "The sun was shining and",
    "There was once a king who had three",
    "The old woman said to the fox,",
    "Deep in the forest there lived",
    'Mom said, "It is time to',
    "The boy was very sad because",
    "It was raining, so Anna",
    "The lion and the mouse",
    "In a small village near the river",
    "The princess opened the door and saw",
    '"Where are you going?" asked',
    "Ben had a red ball. He liked to",
    "The bird could not fly because",
    "When the wolf came to the house,",
    "At last they were home, and",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--full", type=Path, required=True, help="the model before it was quantized")
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = PretrainRecipe.from_file(RECIPES / "tiny.yaml", folder=arguments.data)
    model, tokenizer = load(FOLDER)
    corpus = prepare_corpus(recipe.data, tokenizer, Filters(), arguments.run / "corpus")
    sources = [TextSource(str(arguments.data / pattern)) for patterns in PARTS.values() for pattern in patterns]
    held_out = prepare_corpus(sources, tokenizer, Filters(), arguments.run / "corpus").validation

    losses: dict[str, list[tuple[float, int]]] = {
        "openelm-tiny, float32": network_losses(load_model(arguments.full), recipe, held_out),
        "openelm-tiny, 8 bits": network_losses(model, recipe, held_out),
        "5-gram, modified Kneser-Ney": ngram_losses(recipe, corpus.train, held_out),
    }
    num_bytes = [text_bytes(tokenizer, file) for file in held_out]
    first = json.loads(FIRST.read_text(encoding="utf-8"))["held_out"]["openelm-tiny, 8 bits"]
    figures: dict[str, Any] = {
        "held_out": {
            "first openelm-tiny, 8 bits": first,
            **{name: by_part(found, num_bytes) for name, found in losses.items()},
        },
        "train_tokens": sum(file.num_tokens for file in corpus.train),
        "held_out_tokens": sum(file.num_tokens for file in held_out),
        "parameters": recipe.model.num_parameters,
        "machine": machine(),
    }
    (RESULTS / "tiny_card.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    answers = [generate(model, tokenizer, prompt, max_tokens=ANSWER_TOKENS, sampling=SAMPLING) for prompt in PROMPTS]
    card = write_card(recipe, figures, answers)
    (FOLDER / "README.md").write_text(card, encoding="utf-8")
    print(card)


def network_losses(
    model: OpenELM, recipe: PretrainRecipe, files: tuple[TokenizedDataset, ...]
) -> list[tuple[float, int]]:
    """Sum of losses and number of tokens of each source; rows do not see previous rows."""
    found = []
    for file in files:
        total, count = 0.0, 0
        only = Corpus((), (file,), (), "")
        for rows in validation_rows(only, recipe.sequence_length, 0):
            tokens, known = mx.array(rows.tokens), mx.array(rows.segments[:, 1:] >= 0)
            logits = model(tokens[:, :-1]).astype(mx.float32)
            picked = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
            losses = mx.where(known, mx.logsumexp(logits, axis=-1) - picked, mx.zeros(()))
            total, count = total + float(np.array(losses.sum())), count + int(np.array(known.sum()))
        found.append((total, count))
    return found


def ngram_losses(
    recipe: PretrainRecipe, train: tuple[TokenizedDataset, ...], held_out: tuple[TokenizedDataset, ...]
) -> list[tuple[float, int]]:
    peer = KneserNey(np.concatenate([file.tokens for file in train]), recipe.model.vocab_size)
    found = [peer.losses(np.asarray(file.tokens)) for file in held_out]
    return [(float(losses.sum()), len(losses)) for losses in found]


def text_bytes(tokenizer: Tokenizer, file: TokenizedDataset) -> int:
    documents = (file.document(number)[1:-1] for number in range(file.num_documents))
    return sum(len(tokenizer.decode([int(token) for token in ids]).encode()) for ids in documents)


def by_part(losses: list[tuple[float, int]], num_bytes: list[int]) -> dict[str, dict[str, float]]:
    parts: dict[str, Sequence[int]] = {"all": range(len(losses))}
    for name, patterns in PARTS.items():
        start = sum(map(len, parts.values())) - len(losses)
        parts[name] = range(start, start + len(patterns))
    found = {}
    for name, numbers in parts.items():
        total, count = (sum(losses[number][at] for number in numbers) for at in (0, 1))
        found[name] = {
            "nats_per_token": total / count,
            "bits_per_byte": total / np.log(2) / sum(num_bytes[number] for number in numbers),
            "tokens": count,
        }
    return found


def write_card(recipe: PretrainRecipe, figures: dict[str, Any], answers: list[str]) -> str:
    held_out = figures["held_out"]
    names = list(held_out)
    table = ["| held-out text | tokens | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for part in held_out[names[0]]:
        cells = [f"{held_out[n][part]['nats_per_token']:.3f} ({held_out[n][part]['bits_per_byte']:.3f})" for n in names]
        table.append(f"| {part} | {held_out[names[0]][part]['tokens']:,} | {' | '.join(cells)} |")
    texts = "\n".join(
        f"| {number} | **{prompt}**{LINE_BREAKS.sub(' ', answer)} |"
        for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True), start=1)
    )
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return template.format(
        parameters=figures["parameters"],
        train_tokens=figures["train_tokens"],
        seen=recipe.steps * recipe.batch_size * recipe.sequence_length,
        steps=recipe.steps,
        layers=recipe.model.num_transformer_layers,
        width=recipe.model.model_dim,
        table="\n".join(table),
        texts=texts,
        sampling=f"temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}, repetition penalty "
        f"{SAMPLING.repetition_penalty}, seed {SAMPLING.seed}, {ANSWER_TOKENS} tokens",
    )


if __name__ == "__main__":
    main()
