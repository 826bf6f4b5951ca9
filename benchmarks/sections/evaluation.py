"""Evaluation: scoring beside mlx-lm, and parity with the harness."""

from .page import result, table, where

_TITLES = {
    "arc": "ARC, 0 shots",
    "arc-25": "ARC, 25 shots",
    "commonsense": "commonsense, 4 choices",
    "mmlu": "MMLU, 5 shots",
    "piqa": "PIQA, 0 shots",
    "winogrande": "WinoGrande, 0 shots",
}


def scores() -> str:
    runs = result("score_270M"), result("score_270M_native")
    rows = []
    for name, found in runs[0]["tasks"].items():
        counts = f"{found['items']:,}", f"{found['computed_tokens']:,}"
        rows.append([_TITLES[name], *counts])
        for run in runs:
            own = run["tasks"][name]
            ours, theirs = (own["seconds"][who]["median"] for who in ("openelm-mlx", "mlx-lm"))
            rows[-1] += [f"{ours:.1f}", f"{theirs:.1f}", f"**{own['ratio']:.2f}**"]
        rows[-1].append(f"{found['largest_difference']:.0e}")
    each = ["openelm-mlx, s", "mlx-lm, s", "ratio"]
    headings = ["", "items", "tokens computed", *each, "native, s", *each[1:], "scores differ by"]
    text = table(headings, rows)
    note = (
        "Requests as long as those of real tasks, through 270M in float32 with random weights; mlx-lm by its\n"
        "`MLXLM.loglikelihood`, which computes the prefix of a question once and then one choice at a time. Here each "
        "token of\nthe tree of prompts is computed once. A long prefix of a single question leaves little to gain "
        "from that; with the\n[native kernels](native.md) (the second three columns) its attention takes a tenth of "
        "the time. Differences are in nats; in\nthe commonsense prompts, mlx-lm cuts context and answer at another "
        "token than the harness."
    )
    return f"## Scoring choices\n\n{note}\n\n{text}\n\n{where(runs[0])}\n\n{where(runs[1])}\n"


def parity() -> str:
    runs = {name: result(f"parity_{name}") for name in ("tied_gqa2", "untied_mha_noglu", "trained")}
    first = runs["tied_gqa2"]
    note = (
        f"{first['requests']:,} random requests for each of three small models (no context, blanks at its end, cuts "
        "within words, texts\nthat are cut off, emoji, repeats, continuations that are the greedy ones). The largest "
        "difference of a log-likelihood, in\nnats, and how often the greedy flag and the chosen answer differ:"
    )
    rows = []
    for name, run in runs.items():
        for key, title in (("plain", "one pass per request"), ("hugging_face", "lm-eval with PyTorch")):
            of = run[key]
            greedy = f"{of['greedy_differs']} of {run['greedy']}"
            rows.append([name, title, f"{of['largest']:.1e}", greedy, f"{of['choice_differs']} of {of['questions']}"])
    text = table(["", "", "largest", "greedy", "choices"], rows)
    return f"## Scores beside the harness's\n\n{note}\n\n{text}\n\n{where(first)}\n"
