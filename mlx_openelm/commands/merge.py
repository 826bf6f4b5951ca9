"""`openelm-mlx merge`."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Option

from ..hub import BUILT_IN_MODEL
from .options import Json, Model, Revision, TokenizerOption, examples
from .tables import write_text
from .terminal import byte_bar, mib, print_json, say, step_bar

EXAMPLES = examples(
    "openelm-mlx merge -m OpenELM-270M --adapter arc --output OpenELM-270M-arc",
    "openelm-mlx merge -m OpenELM-270M-4bit --adapter arc --output OpenELM-270M-arc-4bit --quantize 4",
)


def merge(
    adapter: Annotated[str, Option("--adapter", "-a", help="Adapter folder or CoreNet .pt file.", metavar="ADAPTER")],
    output: Annotated[Path, Option("--output", "-o", help="Model folder to write.", metavar="DIR")],
    model: Model = BUILT_IN_MODEL,
    quantize: Annotated[
        int | None,
        Option("--quantize", "-q", help="Quantize the result to BITS and report the KL divergence.", metavar="BITS"),
    ] = None,
    group_size: Annotated[int | None, Option(help="Quantization group size.", metavar="N")] = None,
    mode: Annotated[
        str | None, Option(help="Quantization mode: affine, mxfp4, mxfp8 or nvfp4.", metavar="MODE")
    ] = None,
    dequantize: Annotated[
        bool, Option("--dequantize", help="Write an unquantized model; the default without --quantize.")
    ] = False,
    dtype: Annotated[
        str, Option(help="Type of the weights: auto, float16, bfloat16 or float32.", metavar="D")
    ] = "auto",
    config: Annotated[str | None, Option(help="Configuration for a .pt file.", metavar="FILE_OR_NAME")] = None,
    tokenizer: TokenizerOption = None,
    force: Annotated[bool, Option("--force", "-f", help="Overwrite an existing model.")] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its model and write the result as a standalone model."""
    from ..errors import ConfigError
    from ..merging import merge as run
    from ..quantization import Quantization

    wanted = quantize is not None or mode is not None
    if dequantize and wanted:
        raise ConfigError("--quantize and --dequantize are mutually exclusive")
    if group_size is not None and not wanted:
        raise ConfigError("--group-size requires --quantize or --mode")
    quantization = Quantization.of(quantize, group_size, mode) if wanted else None
    with ExitStack() as bars:
        merging = bars.enter_context(byte_bar("merging"))
        measuring: list[Callable[[int, int], None]] = []

        def measure(done: int, total: int) -> None:
            if not measuring:  # the other bar is done
                bars.close()
                measuring.append(bars.enter_context(step_bar("measuring what quantizing costs")))
            measuring[0](done, total)

        result = run(
            model,
            adapter,
            output,
            quantization=quantization,
            dtype=dtype,
            tokenizer=tokenizer,
            config=config,
            force=force,
            revision=revision,
            on_progress=merging,
            on_measuring=measure,
        )
    if as_json:
        print_json({**asdict(result), "folder": str(result.folder)})
        return
    write_text(f"{result.folder}: {result.num_merged} matrices merged, {mib(result.output_bytes)}")
    if result.unties:
        write_text("the output matrix is no longer tied to the embedding: the adapter changes only the input side")
    if result.dequantized:
        write_text(
            "the result is not quantized, because quantization can erase small changes; "
            "use --quantize to quantize it anyway and report the cost"
        )
    if result.divergence is not None:
        write_text(
            f"quantizing the result costs {result.divergence:.4f} nats per token (KL divergence from the model with "
            f"its adapter, on text it generates); the adapter itself changes it by {result.adapter_divergence:.4f}"
        )
        if result.divergence > (result.adapter_divergence or 0):
            say("warning: quantization changes the model more than the adapter; leave out --quantize, or do not merge")
