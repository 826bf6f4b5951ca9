"""Options that several commands share; a default stands in the dataclass or function that a command calls."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option("--model", "-m", envvar="OPENELM_MLX_MODEL", help="Folder, hub id or built-in model.", metavar="M"),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Stop after this many tokens.", metavar="N")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.", metavar="T")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens with this probability.", metavar="P")]
TopK = Annotated[int, typer.Option(help="Sample from this many of the likeliest tokens; 0: all.", metavar="K")]
MinP = Annotated[float, typer.Option(help="Leave out what is below this share of the likeliest.", metavar="P")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages recent tokens; 1.2 is usual.", metavar="R")]
RepetitionContext = Annotated[int, typer.Option(help="How many tokens count as recent.", metavar="N")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.", metavar="S")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.", metavar="N")]
System = Annotated[str | None, typer.Option(help="System message of an Instruct model.", metavar="TEXT")]
Dtype = Annotated[
    str, typer.Option(help="Compute in auto, float16, bfloat16 or float32.", metavar="D", show_default=True)
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="File, folder or hub id; none goes without.", metavar="FILE_OR_REPO")
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="Adapter on the model: of tune, mlx-lm or PEFT, or a .pt.", metavar="A"),
]
KvBits = Annotated[int | None, typer.Option("--kv-bits", help="Keep keys and values in 4 or 8 bits.", metavar="4|8")]
QuantizedKvStart = Annotated[
    int, typer.Option("--quantized-kv-start", help="Quantize them from this many tokens on.", metavar="N")
]
MaxKvSize = Annotated[
    int | None,
    typer.Option("--max-kv-size", help="Keep only the first and the last tokens, N in all.", metavar="N"),
]
KvSinks = Annotated[int, typer.Option("--kv-sinks", help="How many first tokens a window keeps.", metavar="N")]
PromptCacheFile = Annotated[
    Path | None,
    typer.Option("--prompt-cache", help="Keep keys and values here from one run to the next.", metavar="FILE"),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace existing files.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", metavar="R")]


def examples(*commands: str) -> str:
    """The end of a command's help: what to type, one to a line."""
    return "\n\n".join(["Examples:", *commands])
