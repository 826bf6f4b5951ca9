"""The native kernels beside llama.cpp, mlx-lm and MLX's own operations."""

from typing import Any

from .page import result, table, where

_PEERS = {0: "F32", 3: "Q3_K", 4: "Q4_0", 6: "Q6_K", 8: "Q8_0"}


def native() -> str:
    decoding, larger, prompts = result("native"), result("native_1_1B"), result("native_prompt")
    note = (
        "With [openelm-mlx-native](native.md), in turn with the same without it, mlx-lm and llama.cpp on the same "
        "threads; random\nweights. llama.cpp rounds the inputs of quantized products to 8 bits, the native kernels do "
        "not. Tokens/s of decoding behind\na prompt of 32 tokens:"
    )
    return "\n\n".join(
        [
            f"## Native kernels on a CPU\n\n{note}",
            _speeds(decoding["cases"] + larger["cases"], "decode"),
            "A prompt of 512 tokens, tokens/s:",
            _speeds(prompts["cases"], "prefill"),
            "Many rows at once, as in batches and with drafts: microseconds for a matrix of 5,120 x 1,280,\n"
            "one of 40, by the number of rows.",
            _rows(decoding["rows"]),
            "Decoding against what reading the weights would allow, of "
            f"{result('native_bench')['bandwidth_gb_per_second']:.1f} GB/s:",
            "![Native kernels against the limit](../benchmarks/results/native.png)",
            where(decoding),
            where(larger),
            where(prompts) + "\n",
        ]
    )


def _speeds(cases: list[dict[str, Any]], kind: str) -> str:
    rows = []
    for case in cases:
        found = {name: speeds[kind]["median"] for name, speeds in case["tokens_per_second"].items()}
        bits = f"{case['bits']} bits" if case["bits"] else "float32"
        theirs = f"{found['llama.cpp']:.1f} ({_PEERS[case['bits']]})" if "llama.cpp" in found else ""
        others = [f"{found[name]:.1f}" if name in found else "" for name in ("without", "mlx-lm")]
        over = [
            f"**{found['native'] / found[n]:.2f}**" if n in found else "" for n in ("without", "mlx-lm", "llama.cpp")
        ]
        rows.append([case["size"], bits, f"{found['native']:.1f}", *others, theirs, *over])
    against = ["over without", "over mlx-lm", "over llama.cpp"]
    return table(["", "", "native", "without", "mlx-lm", "llama.cpp", *against], rows)


def _rows(curves: dict[str, Any]) -> str:
    counts: list[str] = []
    times: dict[tuple[str, str], list[str]] = {}
    for title, curve in curves.items():
        for name, found in curve.items():
            bits, count = name.removesuffix(" rows").split(", ")
            counts += [] if count in counts else [count]
            times.setdefault((bits, title), []).append(f"{found['microseconds']:,.0f}")
    return table(["", "", *counts], [[*key, *of] for key, of in sorted(times.items())])
