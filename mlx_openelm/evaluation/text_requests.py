"""Texts that tasks of lm-eval want to be generated: prompts, their settings, and how processes exchange them."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import EvaluationError
from ..generation.sampling import SamplingConfig

if TYPE_CHECKING:
    from .harness import HarnessModel

SEED = 1234  # of lm-eval's draws, and of texts that are sampled
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_NO_DIFFERENCE = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}


class TextRequest:
    """A prompt that a task of lm-eval wants to be continued, and how.

    Args:
        model: what will continue it.
        context: the prompt.
        settings: as the task gives them.

    Attributes:
        ids: of the prompt, without a beginning that leaves no room for the text.
        settings: as lm-eval understands them.
        max_tokens, stop, sampling: how to generate.
        repeat: how often the same prompt came before, if it is sampled.

    Raises:
        EvaluationError: if the package does not have a setting, or the model's context has no room for the prompt.
    """

    def __init__(self, model: "HarnessModel", context: str, settings: Mapping[str, Any]):
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), model.max_gen_toks))
        self.settings = dict(given)
        self.max_tokens: int = given.pop("max_gen_toks")
        eos = model.tokenizer.token_names["eos_token"]
        self.stop: list[str] = handle_stop_sequences(given.pop("until"), eos=eos)
        self.sampling = _sampling(given)
        room = model.max_length - self.max_tokens
        if room < 1:
            raise EvaluationError(
                f"a task generates up to {self.max_tokens:,} tokens; with a context of {model.max_length:,}, the model "
                "has no room for the prompt"
            )
        self.ids = model.tok_encode(context, left_truncate_len=room) or [model.prefix_token_id]
        self.key = json.dumps([context, self.settings], sort_keys=True, default=str)
        self.repeat = 0

    @property
    def name(self) -> str:
        """What tells it from others."""
        return f"{self.repeat} {self.key}"


def exchange_texts(own: Mapping[str, str], group: mx.distributed.Group) -> dict[str, str]:
    """The texts by name of all processes, each of which gives its own."""
    content = np.frombuffer(json.dumps(dict(own)).encode(), np.uint8)
    lengths = _gathered(np.array([len(content)], np.uint32), group)
    sent = np.zeros(int(lengths.max()), np.uint8)
    sent[: len(content)] = content
    received = _gathered(sent, group).reshape(group.size(), -1)
    found: dict[str, str] = {}
    for length, row in zip(lengths, received, strict=True):
        found.update(json.loads(row[:length].tobytes()))
    return found


def _sampling(given: Mapping[str, Any]) -> SamplingConfig:
    """How tokens are chosen by lm-eval's settings."""
    settings = {name: value for name, value in given.items() if value is not None and name != "do_sample"}
    unknown = [
        name for name, value in settings.items() if name not in _SAMPLING and _NO_DIFFERENCE.get(name, ...) != value
    ]
    if unknown:
        raise EvaluationError(
            f"a task generates with {', '.join(f'{name}={settings[name]!r}' for name in unknown)}, which this package "
            f"does not have (it has do_sample, until, max_gen_toks, {', '.join(_SAMPLING)})"
        )
    chosen = {name: settings[name] for name in _SAMPLING if name in settings}
    if not given["do_sample"]:
        return SamplingConfig(repetition_penalty=chosen.get("repetition_penalty", 1.0))
    return SamplingConfig(**{"temperature": 1.0, "seed": SEED, **chosen})


def _gathered(array: np.ndarray, group: mx.distributed.Group) -> np.ndarray:
    return np.array(mx.distributed.all_gather(mx.array(array), group=group, stream=mx.cpu))
