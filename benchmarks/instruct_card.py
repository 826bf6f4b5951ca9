"""Measures openelm-tiny-instruct and writes its card: subjects that stories keep to, and thirty unedited answers.

python benchmarks/instruct_card.py --examples FOLDER --without-preferences MODEL

FOLDER is what `instruct_examples.py` wrote. The measure was fixed before the preference tuning: the share of the things
that a request names ("a story about a cat and a kite") that are in the answer, over requests made of held-out stories.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from common import RESULTS, machine

from mlx_openelm import OpenELM, SamplingConfig, Tokenizer, generate_batch, load
from mlx_openelm.hub import BUILT_IN_CHAT_MODEL, model_folder

SAMPLING = SamplingConfig(repetition_penalty=1.1)  # greedy, as `chat` does by default
MAX_TOKENS = 260
NUM_REQUESTS = 100
SUBJECT = re.compile(r"\ban? ([a-z]+)")

PROMPTS = (
    "Hello!",
    "Who are you?",
    "How are you today?",
    "What can you do?",
    "Tell me a story about a cat and a kite.",
    "Tell me a story about a frog.",
    "Write a short story about a dog and a ball.",
    "Tell me a story about a girl named Mia.",
    "Can you tell me a story about a dragon?",
    "Tell me a story about a train and a hill.",
    "Tell me a story.",
    "Finish this story: Tom had a red boat. One day he took it to the lake.",
    "Finish this story: The little bird was hungry. It looked for food.",
    "Continue this story: It was a cold night. A fox came to the farm.",
    "What did Lily find?\n\nLily went to the beach with her mom. Lily found a shell in the sand. She was happy.",
    "Ben lost his hat. He was sad. Then he saw it in the tree.\n\nHow did Ben feel?",
    "Sam went to the park. He played with a ball.\n\nWhere did Sam go?",
    "Read the story. Anna saw a big bear. Anna ran home.\n\nWhat did Anna see?",
    "Max wanted to fly. He asked a bird for help.\n\nWhat did Max want to do?",
    "Write a sentence about a cat.",
    "What is the capital of France?",
    "What is 12 plus 30?",
    "Why is the sky blue?",
    "Who was Napoleon?",
    "Translate dog into Spanish.",
    "I am sad.",
    "Thank you!",
    "Tell me a joke.",
    "What is your favorite food?",
    "Good night!",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument(
        "--without-preferences", type=Path, required=True, help="the model before it was tuned on pairs"
    )
    arguments = parser.parse_args()
    requests = held_out_requests(arguments.examples / "valid.jsonl")
    figures: dict[str, Any] = {"requests": len(requests), "machine": machine()}
    for name, folder in (("tuned on conversations", arguments.without_preferences), ("then on pairs", None)):
        model, tokenizer = load(folder or BUILT_IN_CHAT_MODEL)
        figures[name] = measured(requests, answers_to(model, tokenizer, [request for request, _ in requests]))
        print(name, figures[name])
    answers = [text for text, _ in answers_to(model, tokenizer, PROMPTS)]
    (RESULTS / "instruct_card.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    card = write_card(figures, answers)
    (model_folder(BUILT_IN_CHAT_MODEL) / "README.md").write_text(card, encoding="utf-8")
    print(card)


def held_out_requests(path: Path) -> list[tuple[str, list[str]]]:
    """Requests for a story, each with the things that it names."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        request = json.loads(line)["messages"][0]["content"]
        _, about, rest = request.partition("story about")
        if about and "named" not in rest and "\n" not in request and SUBJECT.search(rest):
            found.append((request, SUBJECT.findall(rest)))
    return found[:NUM_REQUESTS]


def answers_to(model: OpenELM, tokenizer: Tokenizer, requests: "list[str] | tuple[str, ...]") -> list[tuple[str, bool]]:
    """The answer to each request, and whether it ended by itself."""
    ids = [tokenizer.encode_chat([{"role": "user", "content": request}]) for request in requests]
    found: dict[int, tuple[str, bool]] = {}
    for number, answer in generate_batch(
        model, tokenizer, ids, batch_size=16, max_tokens=MAX_TOKENS, sampling=SAMPLING
    ):
        found[number] = (answer.text, answer.finish_reason != "length")
    return [found[number] for number in range(len(ids))]


def measured(requests: list[tuple[str, list[str]]], answers: list[tuple[str, bool]]) -> dict[str, float]:
    shares = [
        sum(thing in text.lower() for thing in things) / len(things)
        for (_, things), (text, _) in zip(requests, answers, strict=True)
    ]
    return {
        "subjects_kept": sum(shares) / len(shares),
        "ended": sum(ended for _, ended in answers) / len(answers),
    }


def write_card(figures: dict[str, Any], answers: list[str]) -> str:
    lines = [
        f"| {number} | {' '.join(prompt.split())} | {' '.join(answer.split())} |"
        for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True), start=1)
    ]
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return template.format(
        requests=figures["requests"],
        before=f"{figures['tuned on conversations']['subjects_kept']:.0%}",
        after=f"{figures['then on pairs']['subjects_kept']:.0%}",
        ended=f"{figures['then on pairs']['ended']:.0%}",
        answers="\n".join(lines),
    )


if __name__ == "__main__":
    main()
