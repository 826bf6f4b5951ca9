"""Converting, loading, and the memory that they and a growing text take."""

from .page import result, table, where


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
