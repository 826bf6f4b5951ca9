"""`openelm-mlx convert`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .interrupts import INTERRUPTED
from .options import ChatTemplate, Json, Revision, TokenizerOption, examples
from .tables import write_text
from .terminal import byte_bar, fail, mib, print_json, say

EXAMPLES = examples(
    "openelm-mlx convert apple/OpenELM-1_1B-Instruct --quantize 4",
    "openelm-mlx convert corenet.pt --config 270M --output my-270M",
    "openelm-mlx convert a.pt b.pt c.pt --config 3B --output my-3B",
    "openelm-mlx convert openelm_lora_270M.pt --config 270M --output arc-270M",
    "openelm-mlx convert --adapter arc-270M/adapter --to peft --output arc-peft",
)


AVERAGE_EXAMPLES = examples(
    "openelm-mlx average runs/stories --output stories",
    "openelm-mlx average runs/stories/checkpoints/step-* --output stories",
)


def average(
    sources: Annotated[
        list[str],
        typer.Argument(help="Run folder, for its last checkpoints; or checkpoints of one run.", metavar="RUN..."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Model folder to write.", metavar="DIR")],
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: float32, bfloat16, float16 or auto.", metavar="D")
    ] = "float32",
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite an existing model.")] = False,
    as_json: Json = False,
) -> None:
    """Average checkpoints of one run, as Apple did for its final weights."""
    from ..runs import checkpoints_to_average

    chosen = [str(source) for source in checkpoints_to_average(sources)]
    if chosen != sources:
        say(f"averaging {', '.join(Path(source).name for source in chosen)}")
    convert(chosen, output, dtype=dtype, force=force, as_json=as_json)


def convert(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model folder, Hugging Face repo id or CoreNet .pt file; several are averaged.",
            metavar="SOURCE...",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to write; default: the source's name.", metavar="DIR")
    ] = None,
    quantize: Annotated[
        int | None, typer.Option("--quantize", "-q", help="Bits per weight: 2, 3, 4, 5, 6 or 8.", metavar="BITS")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Quantization group size: 32, 64 or 128.", metavar="N")] = None,
    mode: Annotated[
        str | None, typer.Option(help="Quantization mode: affine, mxfp4, mxfp8 or nvfp4.", metavar="MODE")
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Dequantize a quantized source.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: auto (16-bit), float16, bfloat16 or float32.", metavar="D")
    ] = "auto",
    config: Annotated[
        str | None,
        typer.Option(
            help="Configuration: 270M, 450M, 1.1B, 3B, a CoreNet YAML or a config.json.", metavar="FILE_OR_NAME"
        ),
    ] = None,
    tokenizer: TokenizerOption = None,
    chat_template: ChatTemplate = None,
    keep_padding: Annotated[
        bool, typer.Option("--keep-padding", help="Keep the padding rows of CoreNet's vocabulary.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite an existing model or adapter.")] = False,
    revision: Revision = None,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA alpha of a CoreNet checkpoint; default: its rank.", metavar="A")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Adapter to convert, instead of a model.", metavar="ADAPTER")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="Adapter format to write: peft, mlx-lm or openelm-mlx.", metavar="FORMAT")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert an OpenELM model from any format to MLX, or an adapter to another format."""
    from ..conversion.convert import convert as run

    if adapter is not None or to is not None:
        others = {
            "SOURCE": sources,
            "--quantize": quantize,
            "--group-size": group_size,
            "--mode": mode,
            "--dequantize": dequantize,
            "--dtype": dtype != "auto",
            "--config": config,
            "--tokenizer": tokenizer,
            "--chat-template": chat_template,
            "--keep-padding": keep_padding,
            "--revision": revision,
            "--alpha": alpha,
        }
        _convert_adapter(adapter, to, output, [name for name, value in others.items() if value], force, as_json)
        return
    if not sources:
        fail("nothing to convert: give a SOURCE, or an adapter with --adapter")

    at, done_bytes, total_bytes = "", 0, 0
    with byte_bar("writing") as update:

        def on_progress(name: str, done: int, total: int) -> None:
            nonlocal at, done_bytes, total_bytes
            at, done_bytes, total_bytes = name, done, total
            update(done, total)

        try:
            result = run(
                sources,
                output,
                quantize=quantize,
                group_size=group_size,
                mode=mode,
                dequantize=dequantize,
                dtype=dtype,
                config=config,
                tokenizer=tokenizer,
                chat_template=chat_template,
                keep_padding=keep_padding,
                force=force,
                revision=revision,
                alpha=alpha,
                on_progress=on_progress,
            )
        except KeyboardInterrupt:
            where = f" after {at}, {mib(done_bytes)} of {mib(total_bytes)}" if done_bytes else ""
            fail(f"interrupted{where}; nothing was written", INTERRUPTED)
    for warning in result.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json({**asdict(result), "folder": str(result.folder), "config": result.config.to_dict()})
        return
    quantization = result.quantization
    kind = f"{quantization.bits}-bit {quantization.mode}" if quantization else result.dtype
    write_text(
        f"{result.folder}: {result.num_parameters:,} parameters in {kind}, "
        f"{result.bits_per_weight:.2f} bits per weight, "
        f"{mib(result.output_bytes)} (source: {mib(result.source_bytes)})"
    )
    if result.not_quantized:
        write_text(f"not quantized (width is not a multiple of the group size): {', '.join(result.not_quantized)}")
    write_text(f"tokenizer: {result.tokenizer or 'none'}")
    if result.adapter:
        write_text(f"adapter: {result.adapter}")


def _convert_adapter(
    adapter: str | None, to: str | None, output: str | None, others: list[str], force: bool, as_json: bool
) -> None:
    from ..conversion.adapters.forms import convert_adapter

    if adapter is None or to is None or output is None:
        fail("converting an adapter requires --adapter, --to and --output")
    if others:
        fail(f"cannot be used with --adapter: {', '.join(others)}")
    result = convert_adapter(adapter, output, to=to, force=force)
    for warning in result.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json({**asdict(result), "folder": str(result.folder)})
        return
    write_text(f"{result.folder}: {result.method} on {result.num_matrices} matrices, {result.form} format")
