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
    run = result("score_270M")
    rows = []
    for name, found in run["tasks"].items():
        ours, theirs = (found["seconds"][who]["median"] for who in ("openelm-mlx", "mlx-lm"))
        counts = f"{found['items']:,}", f"{found['computed_tokens']:,}"
        rows.append([_TITLES[name], *counts, f"{ours:.1f}", f"{theirs:.1f}", f"**{found['ratio']:.2f}**"])
        rows[-1].append(f"{found['largest_difference']:.0e}")
    headings = ["", "items", "tokens computed", "openelm-mlx, s", "mlx-lm, s", "ratio", "scores differ by"]
    text = table(headings, rows)
    note = (
        "Requests as long as those of real tasks, through 270M in float32 with random weights; mlx-lm by its\n"
        "`MLXLM.loglikelihood`, which computes the prefix of a question once and then one choice at a time. Here each "
        "token of\nthe tree of prompts is computed once. A long prefix of a single question leaves little to gain. "
        "Differences are in nats;\nin the commonsense prompts, mlx-lm cuts context and answer at another token than "
        "the harness."
    )
    return f"## Scoring choices\n\n{note}\n\n{text}\n\n{where(run)}\n"


def parity() -> str:
    run = result("parity_tied_gqa2")
    note = (
        f"{run['requests']:,} random requests (no context, blanks at its end, cuts within words, texts that are cut "
        "off, emoji,\nrepeats). The largest difference of a log-likelihood, in nats, and choices that differ:"
    )
    rows = [
        [title, f"{run[key]['largest']:.1e}", f"{run[key]['choice_differs']} of {run[key]['questions']}"]
        for key, title in (("plain", "one pass per request"), ("hugging_face", "lm-eval with PyTorch"))
    ]
    return f"## Scores beside the harness's\n\n{note}\n\n{table(['', 'largest', 'choices'], rows)}\n\n{where(run)}\n"
