"""A model for lm-evaluation-harness (`lm-eval`), so that it can run any of its tasks with this package's scorer.

Importing this module imports `lm_eval`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import EvaluationError, TokenizerError, quoted
from ..generation.batch import generate_batch
from ..generation.engine import BATCH_SIZE
from ..generation.prompt_cache import model_fingerprint
from ..model.openelm import OpenELM
from ..packages import optional_package
from ..tokenizer.tokenizer import Tokenizer
from .encoding import TokenRequest
from .item_scorer import ItemScorer
from .items import Item
from .requests import Request, Score
from .score_file import ScoreFile, TextFile
from .scorer import Scorer, ScorerConfig
from .text_requests import TextRequest, exchange_texts

optional_package("lm_eval", "tasks of lm-eval need", "evaluate")  # a message for the imports below

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.utils import postprocess_generated_text  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from tqdm import tqdm  # noqa: E402


class HarnessModel(TemplateLM):
    """An OpenELM model as `lm_eval.simple_evaluate(model=...)` takes it.

    Requests are encoded by the harness's own code. Their log-likelihoods are those of a `Scorer`, which computes
    prefixes that requests share once.

    Args:
        model, tokenizer: what `load` gives.
        config: how to score.
        scores, texts: what is known from an earlier run, and where new scores and generated texts are added.
        group: processes that share the work; each of them runs the same tasks, and gets all results.
        batch_size: prompts decoded at once.

    Attributes:
        num_truncated: how many of the scored requests lost the beginning of their context.
        num_not_finite: how many have a log-likelihood that is not a number.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        config: ScorerConfig = ScorerConfig(),  # noqa: B008, frozen
        *,
        scores: ScoreFile | None = None,
        texts: TextFile | None = None,
        group: mx.distributed.Group | None = None,
        batch_size: int = BATCH_SIZE,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.num_truncated = self.num_not_finite = 0
        self._model = model
        self._scorer = Scorer(model, tokenizer, config)
        self._scores, self._texts = scores, texts
        self._group = group if group is not None and group.size() > 1 else None
        self._batch_size = batch_size
        self._shows_bar = sys.stderr.isatty() and (group is None or group.rank() == 0)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS."""
        return self._scorer.encode.prefix_token

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads."""
        return self._scorer.encode.max_length

    @property
    def max_gen_toks(self) -> int:
        """Most tokens to generate where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's own cache of requests depends on: a hash of the vocabulary, and of the chat template."""
        from lm_eval.utils import hash_string

        return f"openelm-mlx-{self.tokenizer.vocab_hash()[:16]}-{hash_string(self.tokenizer.chat_template or '')[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the configuration in its results."""
        parameters: Any = tree_flatten(self._model.parameters())
        return {
            "model_num_parameters": sum(array.size for _, array in parameters),
            "model_dtype": str(self._model.transformer.norm.weight.dtype).removeprefix("mlx.core."),
            "model_sha": model_fingerprint(self._model),
            "max_length": self.max_length,
            "num_truncated": self.num_truncated,
            "num_not_finite": self.num_not_finite,
        }

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a text.

        Args:
            add_special_tokens: whether to put BOS in front; `None`: unless the text begins with its name.
            left_truncate_len: how many of the last ids to keep; `None`: all.
        """
        encode = self._scorer.encode
        ids = encode.text_ids(string, bos=add_special_tokens is None)
        if add_special_tokens:
            ids = [*encode.text_ids(""), *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without `add_generation_prompt`, its last message is left open.

        A template that refuses the system's message is given the others alone.

        Raises:
            TokenizerError: if the model has no chat template.
        """
        try:
            text = self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        except TokenizerError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = self.tokenizer.render_chat(others, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rindex(last.strip())
        ends = (start + len(last.lstrip()), start + len(last.strip()))
        return text[: ends[0] if text[start : ends[0]] == last.lstrip() else ends[1]]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template as text, or `None` if none is asked for."""
        return self.tokenizer.chat_template if chat_template else None

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the greedy one.

        Raises:
            EvaluationError: if a continuation has no token, or more than the model reads.
        """
        if any(request.args == ("", "") for request in requests):
            raise EvaluationError("a request has neither a context nor a continuation")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or not self._shows_bar)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, whose tokens are predicted once each, in windows of `max_length` tokens.

        As in the harness's own models, BOS stands before a text that begins with BOS.
        """
        texts = [request.args[0] for request in requests]
        windows = [[make_disjoint_window(window) for window in self._windows(text)] for text in texts]
        found = iter(self._loglikelihood_tokens([(None, *window) for of in windows for window in of], disable_tqdm))
        totals = []
        for text, of in zip(texts, windows, strict=True):
            totals.append(sum(next(found)[0] for _ in of))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        windows: Iterator[tuple[list[int], list[int]]] = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return windows

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """The answers to requests: their texts, if they have any, and the ids of context and continuation."""
        encoded: dict[Request, TokenRequest] = {}
        asked = [self._request(encoded, *request) for request in requests]
        scores = self._answers(encoded, disable_tqdm)
        self.num_truncated += sum(scores[request].is_truncated for request in asked)
        self.num_not_finite += sum(not scores[request].is_finite for request in asked)
        return [(scores[request].log_likelihood, scores[request].is_greedy) for request in asked]

    def _request(
        self,
        encoded: dict[Request, TokenRequest],
        texts: tuple[str, str] | None,
        context: list[int],
        continuation: list[int],
    ) -> Request:
        """The name under which a request is known; its ids are added to `encoded`."""
        names = (f"\0{json.dumps(context)}", json.dumps(continuation)) if texts is None else texts
        request = Request(*names)
        if request not in encoded:
            found = self._scorer.encode.truncated([*context, *continuation], len(continuation))
            if found is None:
                raise EvaluationError(
                    f"a continuation must have 1 to {self.max_length:,} tokens; {quoted(request.continuation)} has "
                    f"{len(continuation):,}"
                )
            encoded[request] = found
        return request

    def _answers(self, encoded: Mapping[Request, TokenRequest], disable_tqdm: bool) -> dict[Request, Score]:
        scorer = ItemScorer(_Encoded(self._scorer, encoded), self._scores, self._group)
        items = [Item(number, (request,), (), ()) for number, request in enumerate(encoded)]
        found: dict[Request, Score] = {}
        with self._bar(len(items), "requests", disable_tqdm) as bar:
            for item, scores in scorer(items, bar.update):
                assert scores is not None, "requests that cannot be scored were refused"
                (request,) = item.requests
                found[request] = scores[0]
                if not request.context.startswith("\0"):
                    answer = scores[0].log_likelihood, scores[0].is_greedy
                    self.cache_hook.add_partial("loglikelihood", tuple(request), answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that the model generates after each context, up to a stop string.

        Raises:
            EvaluationError: if a task asks for a setting that this package does not have, or leaves no token of the
                model's context to the prompt.
        """
        asked: list[TextRequest] = []
        repeats: dict[str, int] = {}
        for request in requests:
            context, settings = request.args
            new = TextRequest(self, context, settings)
            repeats[new.key] = repeat = repeats.get(new.key, -1) + 1
            new.repeat = 0 if new.sampling.is_greedy else repeat  # of one prompt, other texts are wanted
            asked.append(new)
        alike: dict[str, list[TextRequest]] = {}
        for new in {one.name: one for one in asked}.values():
            alike.setdefault(json.dumps(new.settings, sort_keys=True, default=str), []).append(new)
        texts: dict[str, str] = {}
        with self._bar(sum(map(len, alike.values())), "texts", disable_tqdm) as bar:
            for some in alike.values():
                texts.update(self._generate(some, bar.update))
        for request, one in zip(requests, asked, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, texts[one.name])
        return [texts[one.name] for one in asked]

    def _generate(self, asked: Sequence[TextRequest], on_progress: Callable[[int], Any]) -> dict[str, str]:
        """Texts by name, of prompts with the same settings."""
        rank, size = (0, 1) if self._group is None else (self._group.rank(), self._group.size())
        own = range(len(asked) * rank // size, len(asked) * (rank + 1) // size)
        known = {asked[n].name: self._texts.get(asked[n].name) if self._texts is not None else None for n in own}
        found = {name: text for name, text in known.items() if text is not None}
        on_progress(len(found) * size)
        running = generate_batch(
            self._model,
            self.tokenizer,
            [one.ids for one in asked],
            batch_size=self._batch_size,
            max_tokens=asked[0].max_tokens,
            sampling=asked[0].sampling,
            stop=asked[0].stop,
            numbers=[n for n in own if asked[n].name not in found],
        )
        for number, generation in running:
            name = asked[number].name
            found[name] = postprocess_generated_text(self.tokenizer.decode(generation.tokens), asked[0].stop, None)
            if self._texts is not None:
                self._texts.add(name, found[name])
            on_progress(size)
        return found if self._group is None else exchange_texts(found, self._group)

    def _bar(self, total: int, unit: str, disable: bool) -> Any:
        return tqdm(total=total, unit=f" {unit}", disable=disable or not self._shows_bar)


class _Encoded:
    """A scorer of requests whose ids are known."""

    def __init__(self, scorer: Scorer, encoded: Mapping[Request, TokenRequest]):
        self.config = scorer.config
        self._scorer = scorer
        self._encoded = encoded

    def score(self, requests: Sequence[Request]) -> list[Score]:
        return self._scorer.score_tokens([self._encoded[request] for request in requests])
