"""Speed, memory and results of training."""

from .page import result, table, where


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
