"""Writes `docs/benchmarks.md`, and the table in the README, from the results under `benchmarks/results/`.

python benchmarks/tables.py
"""

import json
import re
from typing import Any

from common import RESULTS, ROOT

INTRODUCTION = """# Benchmarks

Each figure is a ratio of medians: the peer runs on the same folder in the same run, in turn (A B A B). The scripts
under `benchmarks/` make their own models with random weights, so that anyone can run them; `make bench` runs them all.
This page is written by `benchmarks/tables.py` from `benchmarks/results/`.

Nothing here ran on Apple silicon. Absolute numbers are those of the small machine named below each table.
"""


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def where(run: dict[str, Any]) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    name = machine.get("blas", machine.get("preloaded"))  # results name the library in use, older ones LD_PRELOAD
    blas = f", {name}{'' if 'blas' in machine else ' preloaded'}" if name else ""
    return (
        f"{machine['date']}, {machine['device']} of a {machine['system']} machine with {machine['cores']} cores{blas}; "
        f"Python {machine['python']}, {versions}; commit {machine['commit']}.\n\n`{machine['command']}`"
    )


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cold_start() -> tuple[str, str]:
    run = result("cold_start")
    rows = [[name, f"{s['median']:.2f}", f"{s['min']:.2f} to {s['max']:.2f}"] for name, s in run["seconds"].items()]
    text = table(["", "seconds", "from to"], [*rows, ["ratio", f"**{run['ratio']:.2f}**", ""]])
    section = f"## First token of a cold process\n\n270M with random weights in 4 bits.\n\n{text}\n\n{where(run)}\n"
    seconds = [f"{s['median']:.1f} s" for s in run["seconds"].values()]
    return section, f"| time to first token from a cold start, 270M in 4 bits, CPU | {seconds[0]} | {seconds[1]} |"


def decode() -> tuple[str, str]:
    run = result("decode")
    rates = run["tokens_per_second"]
    rows = [[name, f"{s['median']:.2f}", f"{s['min']:.2f} to {s['max']:.2f}"] for name, s in rates.items()]
    text = table(["", "tokens/s", "from to"], [*rows, ["ratio", f"**{run['ratio']:.1f}**", ""]])
    note = (
        "270M with random weights in 4 bits, with the defaults of both. mlx-lm computes in the stored bfloat16, for\n"
        "which MLX's CPU backend has no fast path; this package computes in float32 there and on all cores."
    )
    values = [f"{s['median']:.1f} tokens/s" for s in rates.values()]
    return f"## Decoding on a CPU\n\n{note}\n\n{text}\n\n{where(run)}\n", (
        f"| decoding with defaults, 270M in 4 bits, CPU | {values[0]} | {values[1]} |"
    )


def convert() -> tuple[str, str]:
    run = result("convert")
    seconds, peak = run["seconds"], run["peak_memory_mib"]
    rows = [[name, f"{seconds[name]['median']:.1f}", f"{peak[name]['median']:,.0f}"] for name in seconds]
    ratios = run["ratios"]
    rows += [["ratio", f"**{ratios['seconds']:.2f}**", f"**{ratios['peak_memory']:.2f}**"]]
    text = table(["", "seconds", "peak memory, MiB"], rows)
    title = f"## Converting {run['model']} in {run['dtype']} to 4 bits"
    values = [f"{seconds[name]['median']:.1f} s, {peak[name]['median']:,.0f} MiB" for name in seconds]
    return f"{title}\n\n{text}\n\n{where(run)}\n", f"| converting 1.1B to 4 bits, CPU | {values[0]} | {values[1]} |"


def load() -> str:
    run = result("load")
    rows = [
        [
            name,
            f"{run['seconds'][name]['median']:.2f}",
            f"{run['cpu_seconds'][name]['median']:.2f}",
            f"{size / 2**20:,.0f}",
            *(f"{run['peak_over_network'][kind][name]:.3f}" for kind in ("arrays", "process")),
        ]
        for name, size in run["network_bytes"].items()
    ]
    text = table(
        ["", "seconds", "of all cores", "network, MiB", "peak of arrays, of that", "peak of the process, of that"], rows
    )
    note = (
        f"{run['model']} with random weights in {run['dtype']}, read once before, each in a process of its own. By "
        "default this package computes in\nfloat32 on a CPU, a network of twice the size; in the stored type, as "
        f"mlx-lm, it takes **{run['ratio']:.2f}** times as long and looks for\nNaN and infinity besides."
    )
    return f"## Loading\n\n{note}\n\n{text}\n\n{where(run)}\n"


def train_memory() -> str:
    run = result("train_memory")
    peak, process, seconds = run["peak_memory_mib"], run["process_memory_mib"], run["seconds"]
    rows = [
        [name, *(f"{figures[name]['median']:,.0f}" for figures in (peak, process)), f"{seconds[name]['median']:.1f}"]
        for name in peak
    ]
    text = table(["", "arrays, MiB", "growth of the process, MiB", "seconds"], rows)
    shape = run["shape"]
    note = (
        f"Loss and gradients of {shape['sequence']:,} tokens in float32, vocabulary {shape['vocab']:,}, "
        f"{shape['layers']} layers of\nwidth {shape['model_dim']}. Whole logits are computed with MLX's own means. "
        f"With layers recomputed, the chunked\nloss takes **{run['ratio']:.2f}** of the memory of whole logits."
    )
    return f"## Memory of a training step\n\n{note}\n\n{text}\n\n{where(run)}\n"


def tune() -> tuple[str, str]:
    run = result("tune")
    rows = []
    for checkpointing in ("no", "yes"):
        found = run[f"checkpointing_{checkpointing}"]
        for who in ("openelm-mlx", "mlx-lm"):
            speed, peak = found[who]["tokens_per_second"], found[who]["peak_bytes"]
            spread = f"{speed['min']:,.0f} to {speed['max']:,.0f}"
            rows.append([checkpointing, who, f"{speed['median']:,.0f}", spread, f"{peak['median'] / 2**20:,.0f}"])
        rows.append(["", "ratio", f"**{found['speed_ratio']:.2f}**", "", f"**{found['peak_ratio']:.2f}**"])
    text = table(["checkpointing", "", "tokens/s", "from to", "peak of arrays, MiB"], rows)
    shape = run["shape"]
    losses = run["checkpointing_no"]["losses"]
    apart = max(abs(one - other) for one, other in zip(losses["openelm-mlx"], losses["mlx-lm"], strict=True))
    note = (
        f"LoRA of rank 8 on {shape['layers']} layers of width {shape['model_dim']}, vocabulary {shape['vocab']:,}, "
        f"{shape['batch']} rows of {shape['sequence']:,}\ntokens that all count, float32; mlx-lm by what is behind "
        f"`mlx_lm.lora`. Same adapter, rows and optimizer:\nthe losses of all steps differ by at most {apart:.0e}."
    )
    found = run["checkpointing_yes"]
    values = []
    for who in ("openelm-mlx", "mlx-lm"):
        speed, peak = (found[who][key]["median"] for key in ("tokens_per_second", "peak_bytes"))
        values.append(f"{speed:,.0f} tokens/s, {peak / 2**20:,.0f} MiB")
    row = f"| LoRA on 8 layers of width 512 with gradient checkpointing, CPU | {values[0]} | {values[1]} |"
    return f"## Tuning\n\n{note}\n\n{text}\n\n{where(run)}\n", row


def tune_memory() -> str:
    run = result("tune_memory")
    cases = {name: case for name, case in run.items() if isinstance(case, dict) and "error" in case}
    rows = [
        [name, *(f"{case[key] / 2**20:,.0f}" for key in ("predicted", "measured")), f"{case['error']:+.0%}"]
        for name, case in cases.items()
    ]
    text = table(["", "predicted, MiB", "measured, MiB", "off by"], rows)
    note = (
        "What `tune --dry-run` predicts against the peak of MLX's arrays, for a layer-wise model of 6 layers of width\n"
        "384 whose shape the prediction was not fitted to; 4 rows of 512 tokens unless said otherwise."
    )
    return f"## Predicted memory of tuning\n\n{note}\n\n{text}\n\n{where(run)}\n"


def update() -> str:
    run = result("update")
    rows = [
        [name, f"{way['bytes_per_parameter']:.1f}", *(f"{way['seconds'][key]:.2f}" for key in ("median", "min", "max"))]
        for name, way in run["ways"].items()
    ]
    text = table(["", "bytes per parameter", "seconds", "from", "to"], rows)
    note = (
        f"An update of {run['parameters']:,} parameters by AdamW with clipping: the peak of MLX's arrays, of which\n"
        "the parameters, their gradients and moments alone take 16 bytes. The other checkout is the commit before\n"
        "updates went tensor by tensor; both compute the same numbers."
    )
    return f"## Memory of an update\n\n{note}\n\n{text}\n\n{where(run)}\n"


def train_cache() -> str:
    run = result("train_cache")
    keys = ("cache_mib", "arrays_mib", "process_mib")
    rows = [
        [name, *(f"{way[key]['median']:,.0f}" for key in keys)]
        for name, way in run.items()
        if isinstance(way, dict) and "cache_mib" in way
    ]
    text = table(["", "freed buffers, MiB", "peak of arrays, MiB", "peak of the process, MiB"], rows)
    note = (
        f"After {run['steps']} steps of tuning on rows of 32 to 256 tokens, with the limits that MLX would set on a\n"
        f"Mac of {run['memory_mib']} MiB, imitated on the CPU. mlx-lm frees all buffers after each step; the limit\n"
        "here is a quarter of the memory, so that steps find the buffers of the step before."
    )
    return f"## Freed buffers in training\n\n{note}\n\n{text}\n\n{where(run)}\n"


def tune_arc() -> str:
    run = result("tune_arc")
    (_, before), *_, (step, after) = run["held_out"]
    note = (
        f"openelm-tiny, LoRA of rank 16 ({run['trained_parameters']:,} parameters) on the answers of "
        f"{run['examples']:,} training questions, {step:,} steps,\n{run['seconds'] / 60:.1f} minutes with its "
        f"validations. Loss on the answers of {run['test_examples']:,} test questions: **{before:.3f}** nats per "
        f"token before and\n**{after:.3f}** after. Knowing the form of the answer but not which of the four is right "
        f"would cost\n{run['choice_nats']:.3f}: a model of this size learns the form, and hardly more.\n\n"
        "![The curve](../benchmarks/results/tune_arc.png)"
    )
    return f"## Tuning on ARC-Easy\n\n{note}\n\n{where(run)}\n"


def decode_host() -> tuple[str, str]:
    run = result("decode_host")
    times, hosts, counts = run["milliseconds"], run["host_milliseconds"], run["primitives"]
    rows = [
        [name, f"{times[name]['median']:.2f}", f"{hosts[name]['median']:.2f}", f"{counts[name]:,}"] for name in times
    ]
    ratio = times["mlx-lm"]["median"] / times["compiled"]["median"]
    text = table(["", "ms a token", "of that, the host's to build a step", "primitives"], rows)
    note = (
        "16 layers of width 128, float32: arithmetic hardly counts, and a token costs what it takes to say what is to\n"
        f"be computed. Compiled, decoding is **{ratio:.2f}** times as fast as mlx-lm's `generate_step`."
    )
    values = [f"{times[name]['median']:.1f} ms" for name in ("compiled", "mlx-lm")]
    row = f"| one token through 16 narrow layers, float32, compiled, CPU | {values[0]} | {values[1]} |"
    return f"## Decoding without arithmetic\n\n{note}\n\n{text}\n\n{where(run)}\n", row


def sizes() -> tuple[str, str]:
    run = result("sizes")
    rows = []
    for found in run["results"]:
        case, ratios = found["case"], found["ratios"]
        weights = f"{found['bits']} bits" if found["bits"] else found["dtype"]
        for name, figures in found["figures"].items():
            medians = [figures[f"{key}_tokens_per_second"]["median"] for key in ("prefill", "decode")]
            rows.append(
                [
                    *(("", "", "") if name == "mlx-lm" else (found["model"], weights, f"{case['prompt_tokens']:,}")),
                    name,
                    *(f"{median:,.2f}" for median in medians),
                    f"{figures['peak_memory_bytes'] / 2**20:,.0f}",
                    f"{figures['bandwidth_share']:.0%}",
                ]
            )
        kinds = ("prefill", "decode", "peak_memory")
        rows.append(["", "", "", "ratio", *(f"**{ratios[kind]:.2f}**" for kind in kinds), ""])
    heading = ["model", "weights", "prompt", "", "prefill tokens/s", "decode tokens/s", "peak, MiB", "of bandwidth"]
    text = table(heading, rows)
    note = (
        "`openelm-mlx bench` with random weights, both on the same arrays in float32, one row. The limit is what "
        f"reading weights, keys\nand values would allow with the {run['bandwidth_gb_per_second']:.1f} GB/s that "
        "memory gave in the same run.\n\n![Against the limit](../benchmarks/results/sizes.png)"
    )
    longer = result("prefill")
    (found,) = longer["results"]
    ratios = found["ratios"]
    rates = [f"{figures['prefill_tokens_per_second']['median']:.0f}" for figures in found["figures"].values()]
    text += (
        f"\n\nA prompt of {found['case']['prompt_tokens']} tokens through {found['model']} in {found['dtype']}: "
        f"{rates[0]} and {rates[1]} tokens/s, **{ratios['prefill']:.2f}**; peak\nmemory "
        f"**{ratios['peak_memory']:.2f}**; `{longer['machine']['command']}`."
    )
    first = run["results"][0]
    values = [f"{f['decode_tokens_per_second']['median']:.1f} tokens/s" for f in first["figures"].values()]
    row = f"| decoding, {first['model']} in float32, CPU | {values[0]} | {values[1]} |"
    return f"## Published sizes\n\n{note}\n\n{text}\n\n{where(run)}\n", row


def batch() -> tuple[str, str]:
    run = result("batch")
    rows = []
    for name, found in run["models"].items():
        medians = [found["tokens_per_second"][who]["median"] for who in ("openelm-mlx", "mlx-lm")]
        same = f"{found['rows_as_alone']} of {len(run['prompt_lengths'])}"
        rows.append([name, *(f"{median:,.1f}" for median in medians), f"**{found['ratio']:.2f}**", same])
    text = table(["", "openelm-mlx, tokens/s", "mlx-lm, tokens/s", "ratio", "rows as alone"], rows)
    note = (
        f"Eight prompts of {min(run['prompt_lengths'])} to {max(run['prompt_lengths'])} tokens at once, prefill "
        "included, mlx-lm by its `BatchGenerator`.\nRows as alone: those of this package whose tokens are the ones "
        "that the prompt gets by itself."
    )
    tiny = run["models"]["openelm-tiny"]["tokens_per_second"]
    values = [f"{tiny[who]['median']:,.0f} tokens/s" for who in ("openelm-mlx", "mlx-lm")]
    row = f"| eight prompts of different lengths at once, openelm-tiny, CPU | {values[0]} | {values[1]} |"
    return f"## Batches\n\n{note}\n\n{text}\n\n{where(run)}\n", row


def speculate() -> str:
    run = result("speculate")
    same = run["identical"]
    rows = [
        [name, f"**{found['ratio']:.2f}**", f"{found['acceptance']:.0%}"]
        for name, found in {**run["imposed"], **run["lookup"]}.items()
    ]
    text = table(["guesses", "speed against none", "right"], rows)
    repeats = [found["pairs_seen_before"] for found in run["lookup"].values() if "pairs_seen_before" in found]
    different = ", ".join(f"{count} with {name}" for name, count in same["different"].items())
    note = (
        f"{same['prompts']} prompts of openelm-tiny, {same['tokens']:,} greedy tokens: those that differ from decoding "
        f"without guesses are {different}\n({sum(same['drafted'].values()):,} guesses).\n\nSpeed: a model of 8 "
        "layers of width 768 with a draft model of 2 layers of width 256, whose guesses are made "
        "right\nas often as is said; prompt lookup on the greedy text of that model, of\nwhich "
        f"{repeats[0]:.0%} of the pairs of tokens stood before, on one that goes round in circles ({repeats[1]:.0%}: "
        "the model\nwithout its attention), and on stories of openelm-tiny in float32."
    )
    places = f"The first: {where(run['identical'])}\n\nSpeed: {where({'machine': run['speed_machine']})}"
    return f"## Guesses\n\n{note}\n\n{text}\n\n{places}\n"


def context() -> str:
    run = result("context")
    rows = []
    for name, found in run["kinds"].items():
        first, last = found["milliseconds"][0], found["milliseconds"][-1]
        alone = "" if found["attention_slope"] is None else f"{found['attention_slope']:,.0f}"
        rows.append(
            [name, f"{first:.2f}", f"{last:.2f}", f"{found['slope']:,.0f}", alone, f"{found['largest_step']:.0%}"]
        )
    heading = ["keys and values", "ms, first", "ms, last", "us per 1,000 tokens", "of attention alone", "largest step"]
    note = (
        "Time of a token while a text grows to 4,096 tokens, 6 layers of width 256 in float32, compiled. The slope is "
        "that of a\nstraight line; beside it that of reading keys and values alone, measured apart. The largest step "
        "is the distance of a\npoint from that line, as a share of the mean.\n\n"
        "![Time over context](../benchmarks/results/context.png)"
    )
    return f"## Time over the length of the context\n\n{note}\n\n{table(heading, rows)}\n\n{where(run)}\n"


def text_memory() -> str:
    run = result("text_memory")
    rows = []
    for name, points in run["curves"].items():
        first, last = points[0], points[-1]
        sizes = [(point["arrays"] + point["freed"], point["process"]) for point in (first, last)]
        figures = [f"{size / 2**20:,.1f}" for kind in zip(*sizes, strict=True) for size in kind]
        rows.append([name, f"{last['tokens']:,}", f"{last['kv'] / 2**20:,.1f}", *figures, str(last["waiting"])])
    heading = [
        "keys and values",
        "tokens",
        "of these, MiB",
        "arrays at 1,000, MiB",
        "at the end",
        "process at 1,000, MiB",
        "at the end",
        "waiting",
    ]
    note = (
        "2 layers of width 64, float32. Arrays: MLX's, with the freed ones that it keeps. Process: without keys and "
        "values. Waiting: edges\nof the graph that the cache holds and MLX has not computed.\n\n"
        "![Memory over tokens](../benchmarks/results/text_memory.png)"
    )
    return f"## Memory while a text grows\n\n{note}\n\n{table(heading, rows)}\n\n{where(run)}\n"


def launches() -> str:
    run, before = result("launches"), result("launches_before")
    found = {_counted(line): line for line in run["results"]}
    old = {_counted(line): line["openelm-mlx"] for line in before["results"]}
    for case in found:
        case_of_8 = (*case[:3], "8")
        assert case[3] != "4" or _counts(found[case]) == _counts(found[case_of_8]), "4 bits differ from 8 now"
    sizes = list(dict.fromkeys(case[0] for case in found))
    heading = ["weights", "rows", "keys and values", "", *sizes]
    rows, more = [], []
    for bits, batch, kv in dict.fromkeys(case[1:] for case in found if case[3] != "4"):
        lines = [found[size, bits, batch, kv] for size in sizes]
        what = [f"{bits} bits" if bits else "bfloat16", str(batch), f"{kv} bits" if kv == "8" else kv]
        counts = {who: [f"{line[who]['launches']:,}" for line in lines] for who in lines[0] if who != "case"}
        counts["before"] = [f"{old[size, bits, batch, kv]['launches']:,}" for size in sizes]
        counts["openelm-mlx"] = [f"**{count}**" for count in counts["openelm-mlx"]]
        for who in ("openelm-mlx", "without its own kernels", "before", "mlx-lm"):
            rows.append([*(what if who == "openelm-mlx" else ("", "", "")), who, *counts[who]])
        for who in ("openelm-mlx", "mlx-lm"):
            cost = lines[sizes.index("1.1B")][who]
            moved = (cost["bytes_read"] + cost["bytes_written"]) / 1e6
            late = f"{cost['launches_in_flight']:,} and {cost['bytes_in_flight'] / 1e6:,.1f} MB"
            first = what if who == "openelm-mlx" else ["", "", ""]
            more.append([*first, who, str(cost["copies"]), f"{moved:,.1f}", late])
    tokens = run["results"][0]["case"]["tokens"]
    note = (
        f"Kernels that a Metal GPU starts for one greedy token behind {tokens:,} others: counted, without a GPU. The "
        "graph of the step is\nbuilt with the choices for Metal, compared with the one that MLX would evaluate, and "
        "summed by what each primitive costs in\nMLX's source; `benchmarks/metal_costs.py` says where. Keys and values "
        "in 4 bits take as many as in 8; the window is full.\nBefore: commit "
        f"{before['machine']['commit']}. From 1,024 keys on, a Max or Ultra starts one more per layer, other chips "
        "from 4,096.\nProducts of several rows are counted as on an M1 or M2."
    )
    second = (
        "Of 1.1B. Copies are launches that only bring an input into another order. In flight: what comes on top while "
        "the step\nbefore is not finished, because MLX then copies each buffer of keys and values instead of writing "
        "into it."
    )
    columns = ["weights", "rows", "keys and values", "", "copies", "MB read and written", "in flight"]
    text = f"{table(heading, rows)}\n\n{second}\n\n{table(columns, more)}"
    return f"## Launches on Metal\n\n{note}\n\n{text}\n\n{where(run)}\n"


def _counted(line: dict[str, Any]) -> tuple[str, int, int, str]:
    case = line["case"]
    return case["size"], case["bits"], case["rows"], case["kv"]


def _counts(line: dict[str, Any]) -> list[int]:
    return [cost["launches"] for who, cost in line.items() if who != "case"]


def main() -> None:
    sections = [cold_start(), decode(), decode_host(), sizes(), batch(), convert(), tune()]
    more = [load(), launches(), speculate(), context(), text_memory(), train_memory(), update(), train_cache()]
    more += [tune_memory(), tune_arc()]
    document = "\n".join([INTRODUCTION, *(section for section, _ in sections), *more])
    (ROOT / "docs" / "benchmarks.md").write_text(document, encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(["| | openelm-mlx | mlx-lm |", "|---|---|---|", *(row for _, row in sections)])
    pattern = r"(<!-- measured -->\n).*?(\n<!-- end -->)"
    readme = re.sub(pattern, lambda found: found[1] + rows + found[2], readme, flags=re.DOTALL)
    (ROOT / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
