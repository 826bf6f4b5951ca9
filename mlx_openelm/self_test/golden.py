"""The stored results of the built-in model: logits and a greedy text, computed once in float32 on a CPU.

`python tests/test_golden.py` makes the file again, which is needed whenever the model changes.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import SourceError
from ..generation.engine import generate_tokens
from ..hub import BUILT_IN_MODEL, BUILT_IN_MODELS
from ..model.openelm import OpenELM

MODEL_FOLDER = BUILT_IN_MODELS[BUILT_IN_MODEL]  # a folder of this name elsewhere does not go before
GOLDEN_FILE = MODEL_FOLDER.parent / "self_test" / f"{BUILT_IN_MODEL}.safetensors"
_POSITIONS = 8  # whose logits are stored
_GREEDY_TOKENS = 48


@dataclass(frozen=True)
class Golden:
    """A prompt and what follows it."""

    tokens: mx.array  # (L,) int32
    logits: mx.array  # float32 (P, V), of the last P positions
    greedy: mx.array  # int32, the most likely next tokens, one after the other

    def of(self, network: OpenELM) -> mx.array:
        """The same logits of another network, (P, V) in its type."""
        return network(self.tokens[None])[0, -self.logits.shape[0] :]


def read_golden() -> Golden:
    """The stored results.

    Raises:
        SourceError: if they belong to other weights, or the file is missing.
    """
    if not GOLDEN_FILE.is_file():
        raise SourceError("the stored logits of the built-in model are missing; install the package again")
    found: Any = mx.load(str(GOLDEN_FILE), return_metadata=True)
    arrays, metadata = found
    if metadata["sha256"] != weights_hash():
        raise SourceError("the stored logits belong to other weights than those of the built-in model")
    return Golden(**arrays)


def make_golden(network: OpenELM, tokens: list[int]) -> Golden:
    """The results of a network for a prompt (L,)."""
    prompt = mx.array(tokens, mx.int32)
    greedy = [step.token for step in generate_tokens(network, prompt, max_tokens=_GREEDY_TOKENS, compiled=False)]
    logits = network(prompt[None])[0, -_POSITIONS:].astype(mx.float32)
    return Golden(prompt, logits, mx.array(greedy, mx.int32))


def write_golden(golden: Golden) -> None:
    """Store results for the weights that the built-in model has now."""
    GOLDEN_FILE.parent.mkdir(exist_ok=True)
    mx.save_safetensors(str(GOLDEN_FILE), vars(golden), {"sha256": weights_hash()})


def weights_hash() -> str:
    """SHA-256 of the built-in model's weights file."""
    return hashlib.sha256((MODEL_FOLDER / "model.safetensors").read_bytes()).hexdigest()
