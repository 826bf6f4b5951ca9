"""Made-up data for every task of the harness, in the layout of the real data sets.

Nothing here is from a real data set. Texts have trailing blanks, brackets, several lines, unicode and Jinja's marks.
"""

import random

NUM_DOCUMENTS = 100
NUM_EXAMPLES = 60  # in the split that examples come from
MMLU_SUBJECTS = ("abstract_algebra", "high_school_us_history", "world_religions")
_WORDS = (
    *("fox", "river", "stone", "garden", "letter", "seven", "quiet", "yellow", "lamp", "under", "winter", "bridge"),
    *(
        "café",
        "naïve",
        "日本",
        "зима",
        "🙂",
        "don't",
        "co-op",
        "3.14",
        "[sic]",
        "{{x}}",
        "{%y%}",
        "it's",
        '"so"',
        "a_b",
    ),
    "A/B",
)


def made_up(name):
    """Records of a task by split, always the same."""
    draw = random.Random(f"made up {name}")
    kind = "mmlu" if name.startswith("mmlu_") else "arc" if name.startswith("arc_") else name
    make = _MAKERS[kind]
    test, examples = _SPLITS.get(kind, ("test", "train"))
    splits = {test: [make(draw, number) for number in range(NUM_DOCUMENTS)]}
    if examples != test:
        count = 7 if kind == "mmlu" else NUM_EXAMPLES
        splits[examples] = [make(draw, NUM_DOCUMENTS + number) for number in range(count)]
        if kind in ("hellaswag", "winogrande"):  # examples that equal a question, some of them many times
            for number in range(0, 20, 2):
                for place in {draw.randrange(count) for _ in range(1 if number % 4 else 12)}:
                    splits[examples][place] = dict(splits[test][number])
    return splits


_SPLITS = {
    "boolq": ("validation", "train"),
    "hellaswag": ("validation", "train"),
    "piqa": ("validation", "train"),
    "winogrande": ("validation", "train"),
    "truthfulqa_mc2": ("validation", "validation"),
    "race": ("test", "test"),
    "crows_pairs_english": ("test", "test"),
    "mmlu": ("test", "dev"),
}


def _text(draw, least=2, most=9):
    return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(least, most)))


def _sentence(draw, least=3, most=12):
    """A text that begins and ends in one of the ways that real ones do."""
    start = draw.choice(("", "", "", " ", "The "))
    end = draw.choice((".", ".", "?", " ", ".  ", "\n", "", " (see [1])."))
    return start + _text(draw, least, most) + end


def _arc(draw, number):
    count = draw.choice((3, 4, 4, 4, 4, 5))
    labels = list("12345" if draw.random() < 0.2 else "ABCDE")[:count]
    return {
        "id": f"Mercury_{number}",
        "question": _sentence(draw),
        "choices": {"text": [_text(draw, 1, 5) + draw.choice(("", "", " ", ".")) for _ in labels], "label": labels},
        "answerKey": draw.choice(labels),
    }


def _boolq(draw, number):
    passage = f"{_text(draw)} -- {_sentence(draw, 10, 40)}"
    return {"question": _text(draw), "passage": passage, "idx": number, "label": draw.randrange(2)}


def _hellaswag(draw, number):
    def wikihow():
        marks = ("", "", " [title]", " [step]", " [substeps] ", "[header]  ", "\n", "  ")
        return "".join(draw.choice(marks) + " " + _text(draw, 1, 4) for _ in range(draw.randint(1, 4)))

    first, second = _sentence(draw) + draw.choice(("", wikihow())), draw.choice(("", _text(draw), _text(draw).upper()))
    return {
        "ind": number,
        "activity_label": _text(draw, 1, 3),
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second}",
        "endings": [wikihow() + draw.choice((".", " ", "")) for _ in range(4)],
        "source_id": f"wikihow~{number}",
        "split": "val",
        "split_type": draw.choice(("indomain", "zeroshot")),
        "label": str(draw.randrange(4)),
    }


def _piqa(draw, number):
    return {
        "goal": _sentence(draw),
        "sol1": _sentence(draw),
        "sol2": _sentence(draw),
        "label": draw.randrange(2),
    }


def _sciq(draw, number):
    wrong = {f"distractor{place}": _text(draw, 1, 3) for place in (3, 1, 2)}
    support = draw.choice(("", " ", "\n  ")) + _sentence(draw, 8, 40)
    return {"question": _sentence(draw), **wrong, "correct_answer": _text(draw, 1, 3), "support": support}


def _winogrande(draw, number):
    sentence = (
        f"{_sentence(draw).replace('_', '-')} _ {draw.choice(('', 'and '))}{_text(draw)}{draw.choice(('.', '. '))}"
    )
    return {
        "sentence": sentence.replace(" _", "_") if draw.random() < 0.1 else sentence,
        "option1": _text(draw, 1, 2),
        "option2": _text(draw, 1, 2),
        "answer": draw.choice("12"),
    }


def _race(draw, number):
    def problem():
        cloze = draw.random() < 0.5
        question = f"{_text(draw)}  _  ." if cloze else _sentence(draw)
        options = [_sentence(draw, 1, 6) for _ in range(4)]
        return {"question": question, "answer": draw.choice("ABCD"), "options": options}

    return {
        "article": "\n".join(_sentence(draw, 5, 30) for _ in range(draw.randint(1, 4))),
        "problems": str([problem() for _ in range(draw.randint(1, 4))]),
    }


def _mmlu(draw, number):
    choices = [_text(draw, 1, 5) + draw.choice(("", " ")) for _ in range(4)]
    return {"question": _sentence(draw), "subject": "any", "choices": choices, "answer": draw.randrange(4)}


def _truthfulqa(draw, number):
    right, wrong = draw.randint(1, 4), draw.randint(1, 5)
    first = _sentence(draw, 1, 6) or "No."
    return {
        "question": _sentence(draw),
        "mc1_targets": {"choices": [first, _text(draw)], "labels": [1, 0]},
        "mc2_targets": {
            "choices": [first, *(_sentence(draw, 1, 6) for _ in range(right + wrong - 1))],
            "labels": [1] * right + [0] * wrong,
        },
    }


def _crows(draw, number):
    return {
        "id": number,
        "sent_more": _sentence(draw),
        "sent_less": _sentence(draw),
        "stereo_antistereo": draw.choice(("stereo", "antistereo")),
        "bias_type": "age",
    }


_MAKERS = {
    "arc": _arc,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "sciq": _sciq,
    "winogrande": _winogrande,
    "race": _race,
    "mmlu": _mmlu,
    "truthfulqa_mc2": _truthfulqa,
    "crows_pairs_english": _crows,
}

# Every task with the numbers of examples for which its prompts are compared: those of the suites, and others that show
# how examples are drawn.
CASES = [
    ("arc_challenge", 0),
    ("arc_challenge", 25),
    ("arc_easy", 0),
    ("arc_easy", 3),
    ("boolq", 0),
    ("boolq", 2),
    ("hellaswag", 0),
    ("hellaswag", 10),
    ("piqa", 0),
    ("piqa", 4),
    ("sciq", 0),
    ("sciq", 1),
    ("winogrande", 0),
    ("winogrande", 5),
    ("race", 0),
    ("race", 2),
    ("truthfulqa_mc2", 0),
    ("crows_pairs_english", 0),
    ("crows_pairs_english", 25),
    *((f"mmlu_{subject}", shots) for subject in MMLU_SUBJECTS for shots in (0, 5)),
]

COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
_OFFERED = {
    "boolq": ("true/false", 2),
    "piqa": ("solution", 2),
    "social_i_qa": ("answer", 3),
    "hellaswag": ("ending", 4),
    "winogrande": ("option", 2),
    "openbookqa": ("answer", 4),
}


def made_up_commonsense(name, count=NUM_DOCUMENTS):
    """Records of a task in the format of LLM-Adapters, always the same."""
    draw = random.Random(f"made up commonsense {name}")
    records = []
    for _ in range(count):
        word, offered = _OFFERED.get(name, ("answer", draw.choice((3, 4, 4, 4, 5))))
        if word == "true/false":
            answers, question = ["true", "false"], "Please answer the following question with true or false, question: "
            instruction = f"{question}{_sentence(draw)}\n\nAnswer format: true/false"
        else:
            answers = [f"{word}{number}" for number in range(1, offered + 1)]
            listed = " ".join(f"{answer.capitalize()}: {_sentence(draw, 1, 6)}" for answer in answers)
            question = f"Please choose the correct {word} to the question: {_sentence(draw)}"
            instruction = f"{question}\n\n{listed}\n\nAnswer format: {'/'.join(answers)}"
        answer = draw.choice(answers)
        output = f"the correct answer is {answer}"
        records.append({"instruction": instruction, "input": "", "output": output, "answer": answer})
    return records
