"""Options shared by several commands; defaults come from the dataclass or function that a command calls."""

from pathlib import Path
from typing import Annotated

import typer

MODEL_VARIABLE = "OPENELM_MLX_MODEL"
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar=MODEL_VARIABLE,
        help="Model folder, Hugging Face repo id or built-in model.",
        metavar="M",
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", help="Maximum number of tokens to generate.", metavar="N")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "--temp",
        help="Sampling temperature; 0: always take the most likely token. Default: the model's, else 0.",
        metavar="T",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the smallest set of tokens whose probabilities sum to P. Default: the model's, else 1.",
        metavar="P",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Sample from the K most likely tokens; 0: all. Default: the model's, else 0.", metavar="K"),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Exclude tokens less likely than P times the most likely. Default: the model's, else 0.", metavar="P"
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Penalty on recent tokens; 1: none, 1.2 is typical. Default: the model's, else 1.", metavar="R"),
]
RepetitionContext = Annotated[int, typer.Option(help="Recent tokens the repetition penalty covers.", metavar="N")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.", metavar="S")]
Seed = Annotated[int | None, typer.Option(help="Random seed; the same seed gives the same text.", metavar="N")]
System = Annotated[str | None, typer.Option(help="System message for an Instruct model.", metavar="TEXT")]
Dtype = Annotated[
    str, typer.Option(help="Type to compute in: auto, float16, bfloat16 or float32.", metavar="D", show_default=True)
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="Tokenizer file, folder or Hugging Face repo id; none: no tokenizer.",
        metavar="FILE_OR_REPO",
    ),
]
NeededTokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="Tokenizer file, folder or Hugging Face repo id; default: the model's.",
        metavar="FILE_OR_REPO",
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="Chat template: openelm (CoreNet's), or a file; default: the source's.", metavar="NAME_OR_FILE"),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="Adapter folder (tune, mlx-lm or PEFT) or CoreNet .pt file.", metavar="A"),
]
KvBits = Annotated[int | None, typer.Option("--kv-bits", help="Quantize the KV cache to 4 or 8 bits.", metavar="4|8")]
QuantizedKvStart = Annotated[
    int, typer.Option("--quantized-kv-start", help="Quantize the KV cache once it holds N tokens.", metavar="N")
]
MaxKvSize = Annotated[
    int | None,
    typer.Option(
        "--max-kv-size",
        help="Limit the KV cache to N tokens: the first --kv-sinks ones and the most recent.",
        metavar="N",
    ),
]
KvSinks = Annotated[
    int, typer.Option("--kv-sinks", help="First tokens to keep with --max-kv-size (attention sinks).", metavar="N")
]
PromptCacheFile = Annotated[
    Path | None,
    typer.Option("--prompt-cache", help="File that stores the KV cache between runs.", metavar="FILE"),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite existing files.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hugging Face Hub.", metavar="R")]


def examples(*commands: str) -> str:
    """The epilog of a command's help: example commands, one per line."""
    return "\n\n".join(["Examples:", *commands])
