"""How fast text is generated."""

from mlx_openelm.plot import percent

from .page import result, table, where


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
                    percent(figures["bandwidth_share"]),
                ]
            )
        kinds = ("prefill", "decode", "peak_memory")
        rows.append(["", "", "", "ratio", *(f"**{ratios[kind]:.2f}**" for kind in kinds), ""])
    heading = ["model", "weights", "prompt", "", "prefill tokens/s", "decode tokens/s", "peak, MiB", "of the limit"]
    text = table(heading, rows)
    note = (
        "`openelm-mlx bench` with random weights, both on the same arrays in float32, one row. The limit is what "
        "reading weights, keys\nand values would allow: "
        f"{run['bandwidth_gb_per_second']:.1f} GB/s, the best of all samples of the memory between the runs.\n\n"
        "![Against the limit](../benchmarks/results/sizes.png)"
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


def bandwidth() -> str:
    run = result("bandwidth")
    runs = run["gb_per_second"]
    sizes = list(runs[0])
    names = list(runs[0][sizes[0]])
    rows = [[name, *(", ".join(f"{found[size][name]:.1f}" for found in runs) for size in sizes)] for name in names]
    shares = (", ".join(f"{ratio:.2f}" for ratio in run["ratios"][size]) for size in sizes)
    rows.append(["probe over the best of C and NumPy", *(f"**{share}**" for share in shares)])
    text = table(["GB/s", *sizes], rows)
    note = (
        f"{len(runs)} runs, each the best of many turns; arrays of {sizes[0]} are in no cache, the others in one. "
        "C is\n`benchmarks/read_memory.c` with a thread per core, on pages of either size; NumPy is its maximum, "
        "likewise. MLX\nreads with a stream per core."
    )
    return f"## Memory bandwidth\n\n{note}\n\n{text}\n\n{where(run)}\n"


def blas_start() -> str:
    run = result("blas_start")
    seconds, gflops = run["seconds"], run["gflops"]
    rows = [
        [name, f"{seconds[key]['median']:.2f}", f"{gflops[key]['median']:.1f}"]
        for name, key in (("OpenBLAS, found by the command", "found"), ("`OPENELM_MLX_BLAS=off`", "off"))
    ]
    rows.append(["ratio", f"**{run['ratios']['start']:.2f}**", f"**{run['ratios']['matmul']:.1f}**"])
    text = table(["", "seconds for one token, start included", "float32 products, GFLOP/s"], rows)
    note = (
        "On Linux, the command line looks for a fast BLAS and loads it. That alone takes "
        f"{run['loading']['median'] * 1000:.0f} ms."
    )
    return f"## Finding a BLAS\n\n{note}\n\n{text}\n\n{where(run)}\n"
