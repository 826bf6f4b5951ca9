"""`openelm-mlx info` and `openelm-mlx doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..files.paths import user_path
from ..hub import BUILT_IN_MODEL
from ..runs import SavedStep, read_state, saved_steps
from .options import Adapter, Force, Json, Revision, examples
from .self_test import FILE, run_self_test
from .tables import write_list, write_table, write_text
from .terminal import mib, print_json, with_flags, write

if TYPE_CHECKING:
    from ..conversion.describe import AdapterInfo, ModelInfo
    from ..files.fields import Fields

DOCTOR_EXAMPLES = examples(
    "openelm-mlx doctor", "openelm-mlx doctor --self-test", "openelm-mlx doctor --self-test --only speed --force"
)
EXAMPLES = examples("openelm-mlx info OpenELM-1_1B", "openelm-mlx info corenet.pt --config 270M --json")


def info(
    model: Annotated[
        str, typer.Argument(envvar="OPENELM_MLX_MODEL", help="Model or run folder, hub id, .pt file or built-in model.")
    ] = BUILT_IN_MODEL,
    config: Annotated[str | None, typer.Option(help="Configuration for a .pt file.", metavar="FILE_OR_NAME")] = None,
    adapter: Adapter = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show a model layer by layer: heads, FFN widths, parameters and size."""
    from ..conversion.adapters.forms import open_adapter
    from ..conversion.describe import describe, describe_adapter
    from ..conversion.open import open_source

    source = open_source([model], config=config, revision=revision)
    found = describe(source)
    on_top = describe_adapter(source, open_adapter(adapter, vocab_size=source.config.vocab_size)) if adapter else None
    run = user_path(model)
    best = source.folder if source.folder is not None and source.folder.parent.parent == run else None
    steps = saved_steps(user_path(adapter) if adapter else run) if adapter or best is not None else []
    if as_json:
        more: dict[str, Any] = {"adapter": asdict(on_top)} if on_top else {}
        more.update({"checkpoints": [step._asdict() for step in steps]} if steps else {})
        print_json({**found.to_dict(), **more})
        return
    trained = None if best is None else read_state(best)
    write_text(found.name if trained is None else f"{run.resolve().name}, {found.name}")
    headings = ("layer", "query heads", "kv heads", "FFN width", "parameters", "MiB", "KV bytes/token")
    layers = [
        (
            str(number),
            str(layer.query_heads),
            str(layer.kv_heads),
            f"{layer.ffn_dim:,}",
            f"{layer.parameters:,}",
            f"{layer.nbytes / 2**20:,.2f}",
            f"{layer.kv_bytes_per_token:,}",
        )
        for number, layer in enumerate(found.layers)
    ]
    totals = (
        "total",
        str(sum(layer.query_heads for layer in found.layers)),
        str(sum(layer.kv_heads for layer in found.layers)),
        "",
        f"{sum(layer.parameters for layer in found.layers):,}",
        f"{sum(layer.nbytes for layer in found.layers) / 2**20:,.2f}",
        f"{found.kv_bytes_per_token:,}",
    )
    write_table(headings, [layers, [totals]])
    write("")
    write_list(_about(found, on_top, trained, steps))


def _about(
    found: ModelInfo, on_top: AdapterInfo | None, trained: Fields | None, checkpoints: Sequence[SavedStep]
) -> dict[str, str]:
    tied = "tied to the output" if found.tied_embeddings else "separate output matrix"
    gated = "gated" if found.gated_ffn else "plain"
    kv = [f"{mib(nbytes):>11} {kind}" for kind, nbytes in found.kv_cache_bytes.items()]
    values = {
        "parameters": f"{found.parameters:,}, including the embedding ({tied})",
        "width": f"{found.model_dim:,}, head width {found.head_dim}, {gated} FFN",
        "vocabulary": f"{found.vocab_size:,}",
        "context": f"{found.max_context_length:,} tokens",
        "KV cache": "\n".join(["at that length, of a 16-bit model:", *kv]),
        "on disk": f"{mib(found.nbytes)}, {found.bits_per_weight:.2f} bits per weight",
        "tensors": ", ".join(f"{count} {kind}" for kind, count in found.weights.items()),
    }
    if trained is not None:
        figures = trained.table("best_evaluation") or {"validation loss": trained.get("best_loss")}
        name, value = next(iter(figures.items()))
        best = "" if value is None else f"; best {name} {value:.4f}"
        steps = trained.table("recipe").whole("steps")
        values["trained"] = f"{trained['step']:,} of {steps:,} steps on {trained['tokens']:,} tokens{best}"
    if on_top is not None:
        matrices = ", ".join(f"{count} {name}" for name, count in on_top.matrices.items())
        size = f"{on_top.parameters:,} parameters, rank {on_top.rank}, scale {on_top.scale:g}"
        values["adapter"] = f"{on_top.method} on {matrices}; {size}"
    if checkpoints:
        width = max(len(f"{saved.step:,}") for saved in checkpoints)
        values["checkpoints"] = "\n".join(f"step {saved.step:>{width},}: {_loss(saved)}" for saved in checkpoints)
    return values


def _loss(saved: SavedStep) -> str:
    loss = "not validated" if saved.validation_loss is None else f"validation loss {saved.validation_loss:.4f}"
    return f"{loss}, the one in use" if saved.is_best else loss


def doctor(
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Check on this device what the package computes, and measure its speed, in about five minutes.",
        ),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only the checks of --self-test with this text in their name; repeatable.", metavar="TEXT"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"JSON file for --self-test; default: {FILE}.", metavar="FILE"),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show versions, device and memory, and advice on making this machine faster; or test what it computes."""
    if self_test:
        run_self_test(only or [], output or FILE, force, as_json)
        return
    if only or output or force:
        raise ConfigError("--only, --output and --force require --self-test")
    from ..machine.doctor import examine

    report = examine()
    report = replace(report, advice=tuple(map(with_flags, report.advice)))
    if as_json:
        print_json(report.to_dict())
        return
    wired = "system default" if report.wired_limit_bytes in (None, 0) else mib(report.wired_limit_bytes)
    limit = f", up to {mib(report.memory_limit_bytes)} for a model" if report.memory_limit_bytes is not None else ""
    gflops = report.float32_matmul_gflops
    lines = {
        **report.versions,
        "python": report.python,
        "system": report.system,
        "device": report.device,
        "memory": f"{mib(report.memory_bytes)}{limit}",
        "wired limit": wired if report.device.endswith("(Metal)") else "Metal only",
        "float32 matmul": "not measured" if gflops is None else f"{gflops:,.1f} GFLOP/s",
        "BLAS": report.blas or "system default",
        "native kernels": report.native or "none",
    }
    write_list(lines)
    for advice in report.advice:
        write_text(f"\n* {advice}", "  ")
