"""What Metal is asked to do for a token, counted without a GPU."""

from typing import Any

from .page import result, table, where


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
