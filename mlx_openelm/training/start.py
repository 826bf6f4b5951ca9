"""What tuning starts from: a model, maybe with an adapter, and the format of the examples that it knows."""

import math
from dataclasses import dataclass, replace

import mlx.core as mx

from ..conversion.adapters.forms import open_adapter
from ..data.dataset import ExampleOptions, ExampleSet
from ..errors import AdapterError, ConfigError, quoted
from ..loading import dtype_named, load
from ..model.adapters import SavedAdapter, apply_adapter
from ..model.openelm import OpenELM
from ..tokenizer.chat_template import named_template
from ..tokenizer.example_format import ExampleFormat
from ..tokenizer.tokenizer import Tokenizer
from .tune_recipe import AUTO, TuneRecipe


@dataclass(frozen=True)
class Start:
    """A model ready for examples.

    Attributes:
        recipe: the recipe with the settings of the adapter, the dtype and the maximum length resolved.
        adapter: the adapter that tuning continues; it is part of the model already.
        chat_template: the template that the result records, if it is not that of the base model.
    """

    recipe: TuneRecipe
    model: OpenELM
    tokenizer: Tokenizer
    adapter: SavedAdapter | None
    chat_template: str | None

    @property
    def example_format(self) -> ExampleFormat:
        """The format of the examples to read: what the recipe says, otherwise as those the model was tuned on.

        A remembered style is kept where the records have none of their own, such as pairs of plain texts.
        """
        recipe, known = self.recipe, self.tokenizer.example_format or ExampleFormat()
        style = recipe.prompt_style
        if style == AUTO:
            style = "chat" if recipe.chat_template else "" if known.style == "plain" else known.style
        return ExampleFormat(
            columns=recipe.columns,
            prompt_style=style,
            separator=recipe.separator or known.separator,
            indent=recipe.indent or known.indent,
        )

    @property
    def options(self) -> ExampleOptions:
        """How the records become examples."""
        return ExampleOptions(
            max_length=self.recipe.max_length,
            max_prompt=self.recipe.max_prompt,
            too_long=self.recipe.too_long,
            train_on=self.recipe.train_on,
            example_format=self.example_format,
        )

    def check(self, examples: ExampleSet) -> None:
        """Check that a separator in the recipe has a place in the examples.

        Raises:
            ConfigError: if their prompts are not plain text.
        """
        found = examples.example_format
        if self.recipe.separator and (found.style != "plain" or found.records == "text"):
            style = "" if found.records == "text" else f", presented in {found.style} style"
            raise ConfigError(
                "`separator` belongs between a plain prompt and its completion; "
                f"{examples.path} is in {found.records} format{style}"
            )


def load_start(recipe: TuneRecipe) -> Start:
    """Load the model of a recipe, and the adapter that it starts from.

    Raises:
        OpenELMError: one of its subclasses, if anything is missing or contradictory.
    """
    model, tokenizer = load(recipe.model, dtype=dtype_named(recipe.dtype), tokenizer=recipe.tokenizer or None)
    adapter = None
    if recipe.adapter:
        adapter = open_adapter(recipe.adapter, vocab_size=model.config.vocab_size)
        recipe = continuing(recipe, adapter)
        adapter = replace(adapter, dropout=recipe.dropout)
        apply_adapter(model, adapter, mx.float32 if adapter.method != "full" else None)
        adapter.prepare(tokenizer)
    template = adapter.chat_template if adapter is not None else None
    if recipe.chat_template:
        template = tokenizer.chat_template = named_template(recipe.chat_template)
    context = model.config.max_context_length
    if recipe.max_length > context:
        raise ConfigError(f"max_length must be at most {context}, the model's context length; got {recipe.max_length}")
    dtype = str(model.transformer.norm.weight.dtype).removeprefix("mlx.core.")
    recipe = replace(recipe, max_length=recipe.max_length or context, dtype=dtype)
    return Start(recipe, model, tokenizer, adapter, template)


def continuing(recipe: TuneRecipe, adapter: SavedAdapter) -> TuneRecipe:
    """The recipe with the shape of the adapter that it starts from.

    Raises:
        ConfigError: if the recipe asks for another shape.
        AdapterError: if the adapter cannot be continued.
    """
    found: dict[str, object] = {"method": adapter.method}
    if adapter.method != "full":
        rank = max(rank for rank, _ in adapter.ranks.values())
        found["rank"] = rank
        found["alpha"] = adapter.scale * (math.sqrt(rank) if adapter.rank_stabilized else rank)
        found["rank_stabilized"] = adapter.rank_stabilized
        found["targets"] = tuple(sorted({path.split(".")[-1] for path in adapter.ranks}))
    elif not adapter.tensors:
        raise AdapterError(f"{recipe.adapter} contains no tensors")
    for name, value in found.items():
        asked, default = getattr(recipe, name), getattr(TuneRecipe, name)
        if name == "targets":
            asked, default = tuple(sorted(asked)), tuple(sorted(default))
        same = math.isclose(asked, value, rel_tol=1e-6) if isinstance(value, float) else asked == value
        if not same and asked != default:
            raise ConfigError(
                f"{name} must be {quoted(value)}, as in the adapter {recipe.adapter}; got {quoted(asked)}; leave it "
                "out, or merge the adapter into the model and start anew"
            )
    if recipe.layers:
        raise ConfigError(f"layers must be left out with `adapter`; {recipe.adapter} says which are trained")
    return replace(recipe, **found)  # type: ignore[arg-type]
