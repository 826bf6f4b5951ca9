"""Makes the examples that teach openelm-tiny-instruct to answer, from simple stories and questions about them.

python benchmarks/instruct_examples.py --corpus CORPUS --output FOLDER

Writes train.jsonl and valid.jsonl with one conversation (`messages`) per line. Examples from stories that were held out
of pre-training go into valid.jsonl only. pairs.jsonl has preference pairs: both answers to a request are short stories,
but only the chosen one is about what was asked for. The same corpus gives the same files.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from mlx_openelm.data.corpus import Filters, _split as split_of
from mlx_openelm.data.text_files import read_documents

Messages = list[dict[str, str]]

FOLDER = Path(__file__).parent / "instruct"
LONGEST_STORY = 1100  # characters, about 300 tokens
LONGEST_CONTEXT = 700
SENTENCE = re.compile(r'[^.!?"]+[.!?](?=\s|$)')
NAME = re.compile(r"\bnamed ([A-Z][a-z]+)\b")

WORDS = yaml.safe_load((FOLDER / "words.yaml").read_text(encoding="utf-8"))

ASK_STORY = (
    "Tell me a story about {0}.",
    "Tell me a story about {0}",
    "Tell me a short story about {0}.",
    "Write a story about {0}.",
    "Write a short story about {0}.",
    "Can you tell me a story about {0}?",
    "Please tell me a story about {0}.",
    "I want to hear a story about {0}.",
    "Make up a story about {0}.",
    "tell me a story about {0}",
)
ASK_ANY = (
    "Tell me a story.",
    "Tell me a story",
    "Write a story.",
    "Tell me a short story.",
    "Can you tell me a story?",
)
ASK_AGAIN = ("Tell me another story.", "Another one!", "Tell me one more story.", "Now tell me a story about {0}.")
ASK_END = ("Finish this story: {0}", "Finish the story: {0}", "Continue this story: {0}", "What happens next? {0}")
ASK_SENTENCE = ("Write a sentence about {0}.", "Write one sentence about {0}.", "Say something about {0}.")
KINDS = ("girl", "boy", "cat", "dog", "bird", "bear", "rabbit", "frog")  # of children and animals with a name
NOT_NAMES = {"One", "The", "They", "She", "He", "It", "But", "Then", "When", "Mom", "Dad", "Yes"}
# What a sentence of a story says after a name, and the question that it answers.
FACTS = tuple(
    (re.compile(pattern + "[.!?]"), question)
    for pattern, question in (
        ("(?:had )?found .+", "What did {} find?"),
        ("saw .+", "What did {} see?"),
        ("wanted to .+", "What did {} want to do?"),
        ("(?:loved|liked) to .+", "What did {} like to do?"),
        ("went to .+", "Where did {} go?"),
        ("played with .+", "What did {} play with?"),
        ("learned that .+", "What did {} learn?"),
        ("made .+", "What did {} make?"),
        ("took .+", "What did {} take?"),
        ("had an? .+", "What did {} have?"),
        (f"(?:was|felt) (?:very |so )?(?:{'|'.join(WORDS['feelings'])})\\b.*", "How did {} feel?"),
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random_numbers = random.Random(arguments.seed)
    examples: dict[str, list[Messages]] = {"train": [], "validation": []}
    for split, messages in from_stories(arguments.corpus, random_numbers):
        examples[split].append(messages)
    for messages in [*small_talk(random_numbers), *unknown(random_numbers), *read_questions(arguments.corpus)]:
        examples["validation" if random_numbers.random() < 0.02 else "train"].append(messages)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train.jsonl"), ("validation", "valid.jsonl")):
        random_numbers.shuffle(examples[split])
        lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in examples[split])
        (arguments.output / name).write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(examples[split]):,} conversations")
    chosen = list(preference_pairs(examples["train"], random.Random(arguments.seed + 1)))
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in chosen)
    (arguments.output / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"pairs.jsonl: {len(chosen):,} pairs")


def from_stories(corpus: Path, random_numbers: random.Random) -> Iterator[tuple[str, Messages]]:
    """Requests for a story, for its end, for a sentence, and questions about it, each with the split of its story."""
    seen: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(corpus.glob("tinystories_*.txt")):
        for text in read_documents(path):
            split, story = split_of(text, Filters()), tidy(text)
            if len(story) < 200 or not is_complete(story):
                continue
            for messages in about_story(story, seen[split], random_numbers):
                yield split, messages
            if len(story) <= LONGEST_CONTEXT:
                seen[split].append(story)


def about_story(story: str, earlier: list[str], random_numbers: random.Random) -> Iterator[Messages]:
    things, choice, kind = subjects(story), random_numbers.choice, random_numbers.random()
    facts = questions(story)
    request = choice(ASK_STORY).format(with_articles(things)) if things else choice(ASK_ANY)
    if kind < 0.08:
        request = choice(ASK_ANY)
    if len(story) <= LONGEST_STORY and kind < 0.75:
        messages = dialogue(request, story)
        if facts and len(story) < LONGEST_CONTEXT and random_numbers.random() < 0.6:
            for question, answer in random_numbers.sample(facts, min(len(facts), 2)):
                messages += dialogue(question, answer)
        elif earlier and len(story) + len(earlier[-1]) < LONGEST_STORY and random_numbers.random() < 0.3:
            again = choice(ASK_AGAIN).format(with_articles(things) if things else "a child")
            messages = dialogue(choice(ASK_ANY), earlier[-1]) + dialogue(again, story)
        yield messages
    if 0.5 < kind < 0.85:
        sentences = list(SENTENCE.finditer(story[:400]))
        if len(sentences) > 2:
            end = sentences[random_numbers.randrange(1, min(3, len(sentences) - 1))].end()
            if 100 < len(story) - end < LONGEST_STORY and story[:end].count('"') % 2 == 0:
                yield dialogue(choice(ASK_END).format(story[:end].strip()), story[end:].strip())
    if facts and kind > 0.3:
        question, answer = choice(facts)
        context = around(story, answer)
        if context:
            order = (f"{context}\n\n{question}", f"{question}\n\n{context}", f"Read the story. {context}\n\n{question}")
            yield dialogue(choice(order), answer)
    if things and kind > 0.94:
        fitting = [s for s in map(tidy, SENTENCE.findall(story)) if re.search(rf"\b{things[0]}\b", s) and len(s) < 100]
        if fitting:
            yield dialogue(choice(ASK_SENTENCE).format(with_articles(things[:1])), choice(fitting))


def subjects(story: str) -> list[str]:
    """One or two things that a story is about: named early and more than once; or a child with its name."""
    words = re.findall(r"[a-z]+", story.lower())
    early = words[: len(words) // 2]
    found = sorted((thing for thing in WORDS["things"] if thing in early and words.count(thing) > 1), key=words.count)[
        ::-1
    ][:2]
    name = NAME.search(story[:200])
    kinds = [
        kind for kind in ("girl", "boy", "cat", "dog", "bird", "bear", "rabbit", "frog") if f"{kind} named" in story
    ]
    if name and kinds and len(story) % 3 == 0:
        return [f"{kinds[0]} named {name[1]}"]
    return sorted(found, key=words.count)[::-1][:2]


def with_articles(things: list[str]) -> str:
    return " and ".join(f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in things)


def questions(story: str) -> list[tuple[str, str]]:
    """Questions about named characters that exactly one sentence of the story answers, each with that sentence."""
    names = set(NAME.findall(story)) | {name for name in re.findall(r"\b[A-Z][a-z]+\b", story) if story.count(name) > 3}
    sentences = [sentence.strip() for sentence in SENTENCE.findall(story)]
    found = []
    for name in sorted(names - NOT_NAMES):
        own = [s.removeprefix(f"{name} ") for s in sentences if s.startswith(f"{name} ") and len(s) < 90]
        for pattern, question in FACTS:
            answers = [rest for rest in own if pattern.fullmatch(rest)]
            if len(answers) == 1:
                found.append((question.format(name), f"{name} {answers[0]}"))
    return found


def around(story: str, sentence: str) -> str:
    """The sentences around one, of at most `LONGEST_CONTEXT` characters; nothing if quotation marks would be cut."""
    at = story.find(sentence)
    start = max(0, story.rfind("\n\n", 0, at) + 2 if "\n\n" in story[:at] else 0)
    end = story.find("\n\n", at)
    context = story[start : end if end > 0 else len(story)]
    return context if len(context) <= LONGEST_CONTEXT and context.count('"') % 2 == 0 else ""


def small_talk(random_numbers: random.Random) -> Iterator[Messages]:
    groups = yaml.safe_load((FOLDER / "small_talk.yaml").read_text(encoding="utf-8"))
    for group in groups:
        for ask in group["ask"]:
            for _ in range(6):
                yield dialogue(ask, random_numbers.choice(group["answer"]))


def unknown(random_numbers: random.Random) -> Iterator[Messages]:
    data = yaml.safe_load((FOLDER / "unknown.yaml").read_text(encoding="utf-8"))
    for ask in data["ask"]:
        for _ in range(24):
            filled = re.sub(r"\{(\w+)\}", lambda field: random_numbers.choice(data["fill"][field[1]]), ask)
            yield dialogue(filled, random_numbers.choice(data["answer"]))


def read_questions(corpus: Path) -> Iterator[Messages]:
    """Questions about a text from FairytaleQA and bAbI, as far as the text is short."""
    for name, at_most in (("instruct_fairytaleqa", 1500), ("instruct_babi", 500)):
        lines = (corpus / "instruct" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        short = [record for record in records if 0 < len(record["input"]) <= LONGEST_CONTEXT]
        for record in short[:at_most]:
            yield dialogue(f"{record['instruction']}\n\n{record['input']}", record["output"])


def preference_pairs(conversations: list[Messages], random_numbers: random.Random) -> Iterator[dict[str, Messages]]:
    """Requests for a story with the story that they were made of, and one of the same length without their things."""
    stories = []
    for messages in conversations:
        _, about, rest = messages[0]["content"].partition("story about")
        things = re.findall(r"\ban? ([a-z]+)", rest)
        short = len(messages) == 2 and len(messages[1]["content"]) < 650
        if about and things and short and "named" not in rest and not messages[0]["content"].startswith("Finish"):
            stories.append((messages, things))
    for messages, things in stories:
        story = messages[1]["content"]
        if not all(thing in story[:400].lower() for thing in things):
            continue
        for _ in range(50):
            other = random_numbers.choice(stories)[0][1]
            if abs(len(other["content"]) - len(story)) < 80 and not any(t in other["content"].lower() for t in things):
                yield {"chosen": messages, "rejected": [messages[0], other]}
                break


def dialogue(request: str, answer: str) -> Messages:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def tidy(text: str) -> str:
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n\n", text.strip()))


def is_complete(story: str) -> bool:
    return story[-1] in '.!?"' and story[0].isupper()


if __name__ == "__main__":
    main()
