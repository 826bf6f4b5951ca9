"""`openelm-mlx design`."""

import json
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from ..cache.config import kv_bytes_per_layer
from ..config import FFN_MULTIPLIERS, QKV_MULTIPLIERS, OpenELMConfig
from ..errors import ConfigError
from ..files.output import output_file
from ..model.design import (
    Design,
    design,
    fit,
    parse_count as count,
    parse_multipliers as multipliers,
    usual_vocabulary,
)
from .options import Force, Json, examples
from .tables import write_list, write_table
from .terminal import print_json, say, write

HEAD_DIM = 64  # with --layers
_STORIES = "examples/stories/*.txt"  # in a clone of the repository
EXAMPLES = examples(
    "openelm-mlx design --params 1.1B",
    "openelm-mlx design --params 5M --save toy.json --plot widths.png",
    "openelm-mlx design --layers 12 --model-dim 768 --head-dim 64 --save config.json",
)


def _ends(values: tuple[float, ...]) -> str:
    return ":".join(str(value) for value in values)


def design_command(
    params: Annotated[
        str | None, typer.Option(help="Target number of parameters, such as 1.1B.", metavar="COUNT")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers; requires --model-dim.", metavar="N")] = None,
    model_dim: Annotated[int | None, typer.Option(help="Model width; requires --layers.", metavar="M")] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Head width; default: by model width, or 64 with --layers.", metavar="D")
    ] = None,
    qkv: Annotated[
        str, typer.Option(help="QKV multipliers of the first and last layer.", metavar="FIRST:LAST")
    ] = _ends(QKV_MULTIPLIERS),
    ffn: Annotated[
        str, typer.Option(help="FFN multipliers of the first and last layer.", metavar="FIRST:LAST")
    ] = _ends(FFN_MULTIPLIERS),
    gqa: Annotated[
        int, typer.Option(help="Query heads per key/value head.", metavar="N")
    ] = OpenELMConfig.num_gqa_groups,
    vocab: Annotated[
        int | None,
        typer.Option(
            help="Vocabulary size; default with --params: 4096 below 20M, 16384 below 100M; otherwise 32000.",
            metavar="V",
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(help="Context length in tokens.", metavar="N")
    ] = OpenELMConfig.max_context_length,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Show and save the uniform model of the same size instead.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Image of both models.", metavar="FILE")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Configuration file to write, for training.", metavar="config.json")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Design a model with layer-wise scaling and compare it with the uniform model of the same size."""
    if (params is None) == (layers is None) or (layers is None) != (model_dim is None):
        raise ConfigError("give either --params, or both --layers and --model-dim")
    for name, value in {
        "--layers": layers,
        "--model-dim": model_dim,
        "--head-dim": head_dim,
        "--gqa": gqa,
        "--vocab": vocab,
    }.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be positive; got {value}")
    ends: dict[str, Any] = {"qkv_multipliers": multipliers("--qkv", qkv), "ffn_multipliers": multipliers("--ffn", ffn)}
    num_parameters = None if params is None else count(params)
    size = vocab or (OpenELMConfig.vocab_size if num_parameters is None else usual_vocabulary(num_parameters))
    rest: dict[str, Any] = {"vocab_size": size, "max_context_length": context, "num_gqa_groups": gqa}
    if layers is not None and model_dim is not None:
        config = OpenELMConfig.layerwise(layers, model_dim, head_dim or HEAD_DIM, **ends, **rest)
    else:
        assert num_parameters is not None, "one of the two ways was checked above"
        config = fit(num_parameters, head_dim=head_dim, **ends, **rest)
    found = design(config)
    with ExitStack() as claims:
        configuration, picture = (
            None if path is None else claims.enter_context(output_file(path, overwrite=force)) for path in (save, plot)
        )
        if configuration is not None:
            chosen = found.uniform if uniform else found.layerwise
            configuration.write(json.dumps(chosen.to_dict(), indent=2) + "\n")
        if picture is not None:
            from ..plot import plot_design

            plot_design(found, picture)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found, uniform)
    for path in (save, plot):
        if path is not None:
            say(f"wrote {path}")
    if save is not None:
        pattern, note = _stories()
        line = f"openelm-mlx pretrain --model {quote(str(save))} --data {pattern} --output run{note}"
        (say if as_json else write)(f"train it: {line}")


def _stories() -> tuple[str, str]:
    """Text to train on: that of a clone of the repository, or else a pattern, and a note that it stands for one."""
    if next(Path().glob(_STORIES), None) is not None:
        return f'"{_STORIES}"', ""
    return '"TEXTS/*.txt"', ", with your texts in place of TEXTS"


def _show(found: Design, uniform: bool) -> None:
    """Print the chosen model layer by layer with totals, then one line for the uniform model's identical layers."""
    config = found.uniform if uniform else found.layerwise
    headings = ("layer", "query heads", "kv heads", "FFN width", "parameters", "KV bytes")

    def columns(config: OpenELMConfig) -> list[list[int]]:
        heads = list(config.num_query_heads), list(config.num_kv_heads)
        return [*heads, list(config.ffn_dims), list(config.layer_parameters), list(kv_bytes_per_layer(config))]

    def row(name: str, numbers: list[int | None]) -> list[str]:
        return [name, *("" if number is None else f"{number:,}" for number in numbers)]

    def totals(config: OpenELMConfig) -> list[str]:
        return row("total", [None if at == 2 else sum(values) for at, values in enumerate(columns(config))])

    layers = [
        row(str(layer), [values[layer] for values in columns(config)]) for layer in range(config.num_transformer_layers)
    ]
    sections = [layers, [totals(config)]]
    if not uniform:
        sections.append([row("uniform", [values[0] for values in columns(found.uniform)]), totals(found.uniform)])
    write_table(headings, sections)
    shared = f"{config.num_gqa_groups} query heads per key/value head"
    write("")
    values = {
        "KV bytes": "16-bit keys and values of one token",
        "layers": f"{config.num_transformer_layers}",
        "width": f"{config.model_dim:,}, head width {config.head_dim}, {shared}",
        "vocabulary": f"{config.vocab_size:,}, tied to the output",
        "parameters": f"{config.num_parameters:,}, including the embedding",
    }
    if not uniform:
        values["uniform"] = f"{found.uniform.num_parameters:,}, including the embedding; all its layers are identical"
    write_list(values)
