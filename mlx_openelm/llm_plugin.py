"""A plugin for the `llm` command (the package of that name): OpenELM models by name, with streaming and conversations.

`llm` imports this module at every start, so that everything heavy is imported where it is used.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import click
import llm
from pydantic import Field

from .errors import OpenELMError, SourceError
from .files.output import write_file
from .files.paths import exists, user_path
from .hub import BUILT_IN_MODELS, model_folder

_OWN_MODELS = "openelm.json"  # in the folder of `llm`: what `llm openelm add` remembers


def _sampled(description: str, default: int) -> Any:
    """An option of sampling; a model's `generation_config.json` may say what it is if nobody sets it."""
    return Field(default=None, description=f"{description}; default: the model's, else {default}")


class Options(llm.Options):
    """What `llm -o NAME VALUE` takes; the limits are those of `SamplingConfig`."""

    max_tokens: int = Field(default=256, ge=1, description="Most tokens to generate")
    temperature: float | None = _sampled("Sampling temperature; 0: always take the most likely token", 0)
    top_p: float | None = _sampled("Sample from the most likely tokens that reach this probability", 1)
    top_k: int | None = _sampled("Sample from this many of the most likely tokens; 0: all", 0)
    min_p: float | None = _sampled("Exclude tokens less likely than this share of the most likely", 0)
    repetition_penalty: float | None = _sampled("Penalty on recent tokens; 1: none", 1)
    seed: int | None = Field(default=None, description="The same seed gives the same text")
    stop: str | None = Field(default=None, description="Stop before this text")
    raw: bool = Field(default=False, description="Continue the prompt as plain text, without the chat template")


class OpenELMModel(llm.Model):
    """A model for `llm`: an Instruct model answers in its chat template, any other continues the prompt.

    Args:
        model_id: name in `llm`.
        model, adapter: as for `load`.
    """

    can_stream = True
    Options = Options  # type: ignore[assignment]  # llm wants the class under this name

    def __init__(self, model_id: str, model: str, adapter: str | None = None):
        self.model_id = model_id
        self._model = model
        self._adapter = adapter

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Iterator[str]:
        """Yield the text of the answer, piece by piece or at once."""
        try:
            pieces = self._pieces(prompt, response)
            yield from pieces if stream else ["".join(pieces)]
        except OpenELMError as error:
            raise llm.ModelError(str(error)) from error

    def _pieces(self, prompt: Any, response: Any) -> Iterator[str]:
        from .generation.defaults import default_sampling, given_sampling
        from .generation.text import stream_generate

        options = prompt.options
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = given_sampling(**{name: getattr(options, name) for name in names})
        model, tokenizer, cache = _loaded(self._model, self._adapter)
        chat = tokenizer.uses_chat_template(False if options.raw else None)
        stream = stream_generate(
            model,
            tokenizer,
            _encoded(tokenizer, prompt.messages, chat),
            max_tokens=options.max_tokens,
            sampling=default_sampling(model, **given),
            stop=[options.stop] if options.stop else [],
            cache=cache,
        )
        at_start = chat  # an answer begins after the white space of the template
        for chunk in stream:
            text = chunk.text.lstrip() if at_start else chunk.text
            at_start = at_start and not text
            yield text
            if chunk.finish_reason is not None:
                stats = chunk.stats
                response.set_usage(input=stats.prompt_tokens, output=stats.generated_tokens)
                response.response_json = {"finish_reason": chunk.finish_reason, "seed": stats.seed}


@cache
def _loaded(model: str, adapter: str | None) -> tuple[Any, Any, Any]:
    """A model, its tokenizer, and a cache that the turns of `llm chat` share; loaded once in a process."""
    from .generation.prompt_cache import PromptCache
    from .loading import load

    network, tokenizer = load(model, adapter=adapter)
    return network, tokenizer, PromptCache(network)


def _encoded(tokenizer: Any, messages: list[Any], chat: bool) -> list[int]:
    """Ids of a conversation of `llm`: all of it in the chat template, or all texts one after the other."""
    turns = [
        {"role": message.role, "content": "".join(getattr(part, "text", "") for part in message.parts)}
        for message in messages
    ]
    if not any(turn["content"] for turn in turns):
        raise SourceError("the prompt is empty")
    if chat:
        return tokenizer.encode_chat(turns)
    if any(turn["role"] == "system" for turn in turns):
        raise SourceError("a system prompt requires a chat template, and this is a base model or `raw` is set")
    return tokenizer.encode("".join(turn["content"] for turn in turns))


def _own_models() -> dict[str, dict[str, str | None]]:
    """Models that were added, by name; none if the file cannot be read."""
    path = llm.user_dir() / _OWN_MODELS
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: about for name, about in values.items() if isinstance(about, dict) and about.get("model")}


def _remember(models: dict[str, dict[str, str | None]]) -> None:
    write_file(llm.user_dir() / _OWN_MODELS, json.dumps(models, indent=2) + "\n", overwrite=True)


@llm.hookimpl
def register_models(register: Any) -> None:
    """Register the built-in models and those that `llm openelm add` remembers."""
    for name in BUILT_IN_MODELS:
        register(OpenELMModel(name, name))
    for name, about in _own_models().items():
        register(OpenELMModel(name, str(about["model"]), about.get("adapter")))


@llm.hookimpl
def register_commands(cli: Any) -> None:
    """Add `llm openelm`, which manages the models with names of your choice."""

    @cli.group(name="openelm")
    def openelm() -> None:
        """Manage the OpenELM models that llm knows by name."""

    @openelm.command()
    @click.argument("model")
    @click.option("--name", help="Name in llm; default: the model's.")
    @click.option("--adapter", help="Adapter folder to apply.")
    def add(model: str, name: str | None, adapter: str | None) -> None:
        """Add MODEL, a folder or a Hugging Face repo id, which is downloaded."""
        try:
            folder = model_folder(model)
            is_local = exists(user_path(model))
            if adapter is not None and not exists(user_path(adapter)):
                raise SourceError(f"{adapter} does not exist")
            name = name or (folder.resolve().name if is_local else model)
            if name in BUILT_IN_MODELS:
                raise SourceError(f"{name} is the name of a built-in model; choose another `--name`")
            known = {
                "model": str(folder.resolve()) if is_local else model,
                "adapter": str(user_path(adapter).resolve()) if adapter is not None else None,
            }
            _remember({**_own_models(), name: known})
        except OpenELMError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f'Try it: llm -m {name} "Once upon a time"')

    @openelm.command(name="list")
    def list_models() -> None:
        """List the models and where they are."""
        for name in BUILT_IN_MODELS:
            click.echo(f"{name}: built in")
        for name, about in _own_models().items():
            adapter = f" with {about['adapter']}" if about.get("adapter") else ""
            click.echo(f"{name}: {about['model']}{adapter}")

    @openelm.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Forget the model called NAME; its files stay."""
        models = _own_models()
        if name not in models:
            raise click.ClickException(f"{name} is not among the added models: {', '.join(models) or 'there are none'}")
        _remember({other: about for other, about in models.items() if other != name})
