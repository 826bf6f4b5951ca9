"""Log-likelihoods beside those of lm-evaluation-harness: random requests, scored here and by its Hugging Face backend.

The requests are hard ones: no context, blanks and newlines at its end, cuts within words and characters, more tokens
than the model reads, emoji, single tokens, repeats, what the model itself would say. Compared are

* the ids: the harness's own code on a tokenizer of the `tokenizers` package, with the same vocabulary,
* the scores: one plain pass in float32 per request over those ids,
* and, with PyTorch, `HFLM` of the harness on the same weights.

python benchmarks/parity.py MODEL_FOLDER... [--requests 2000] [--max-length 2048] [--text FILE] [--no-torch]

Needs `lm-eval` and `transformers`, and PyTorch for the last comparison.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from common import report

from mlx_openelm import OpenELM, Tokenizer, load_model
from mlx_openelm.evaluation.encoding import RequestEncoder
from mlx_openelm.evaluation.requests import Request
from mlx_openelm.evaluation.scorer import FAILED, Scorer, ScorerConfig

TEXT = "the a small fox ran to river house red. garden, cold stones; water? morning (quiet) years 3.14 Book’s"
ODD = ["😀", "👩‍🚀", "é", "e\u0301", "ﬁ", "日本", "\u00a0", "</s>", "<unk>", "\t", "--", "''", "_x_", "ß", "\u200b"]
ENDS = ["", "", "", " ", "  ", "\n", "\n\n", " \n ", "\n" + " " * 16]
CHOICES = 4  # requests that stand for the choices of one question


class Answer(NamedTuple):
    """A log-likelihood, and whether the continuation is the greedy one."""

    log_likelihood: float
    is_greedy: bool


def requests(count: int, max_length: int, seed: int = 0, text: str = "") -> list[Request]:
    """Random requests, in questions of `CHOICES` with one context each; some occur twice."""
    chance = random.Random(seed)
    words = (text or TEXT).split(" ")
    found: list[Request] = []
    while len(found) < count:
        context = _context(chance, words, max_length)
        found += [Request(context, _continuation(chance, words)) for _ in range(CHOICES)]
        if chance.random() < 0.05:
            found += found[-CHOICES:]
    return found[:count]


def _context(chance: random.Random, words: Sequence[str], max_length: int) -> str:
    kind = chance.random()
    if kind < 0.06:
        return ""
    if kind < 0.09:
        return chance.choice(ENDS[3:])
    length = max_length if kind < 0.11 else chance.randint(1, 40)
    text = _words(chance, words, length)
    if kind < 0.3:  # a cut within a word or a character
        text = text[: chance.randint(1, len(text))]
    return ("<s>" if kind > 0.98 else "") + text + chance.choice(ENDS)


def _continuation(chance: random.Random, words: Sequence[str]) -> str:
    kind = chance.random()
    if kind < 0.15:
        return chance.choice(["A", " A", " yes", "no", ".", " 1", "\n"])
    text = _words(chance, words, chance.randint(1, 60 if kind > 0.95 else 8))
    return chance.choice([" ", " ", " ", "", "\n", "  "]) + text + chance.choice(ENDS)


def _words(chance: random.Random, words: Sequence[str], count: int) -> str:
    start = chance.randrange(max(1, len(words) - count))
    chosen = list(words[start : start + count]) if len(words) > 1000 else [chance.choice(words) for _ in range(count)]
    for place in range(0, len(chosen), 7):
        if chance.random() < 0.3:
            chosen[place] += chance.choice(ODD)
    return " ".join(chosen)


def with_greedy(
    model: OpenELM, tokenizer: Tokenizer, encode: RequestEncoder, asked: Sequence[Request]
) -> list[Request]:
    """The requests; in one question of four, the last choice is the text of the likeliest next tokens."""
    found = list(asked)
    for number in range(CHOICES - 1, len(found), 4 * CHOICES):
        own = encode(found[number])
        if own is None:
            continue
        ids = own.ids[: -own.num_scored].tolist()
        before = len(tokenizer.decode(ids))
        for _ in range(1 + number // (4 * CHOICES) % 3):
            ids.append(int(np.array(model(mx.array([ids]))[0, -1]).argmax()))
        if continuation := tokenizer.decode(ids)[before:]:
            found[number] = Request(found[number].context, continuation)
    return found


def llama_tokenizer(path: Path) -> Any:
    """A tokenizer of `transformers` for a SentencePiece model, put together as Llama 2's own `tokenizer.json` is."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer as Package, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = SentencePieceProcessor(model_file=str(path))
    vocabulary = {pieces.id_to_piece(token): token for token in range(pieces.vocab_size())}
    scores = {piece: pieces.get_score(token) for piece, token in vocabulary.items()}
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in sorted(vocabulary, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary and not pieces.is_byte(vocabulary[piece])
    ]
    has_bytes = any(pieces.is_byte(token) for token in range(pieces.vocab_size()))
    unknown = pieces.id_to_piece(pieces.unk_id())
    model = models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    package = Package(model)
    package.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    package.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = [pieces.id_to_piece(token) for token in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())]
    package.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    package.post_processor = processors.TemplateProcessing(
        single=f"{names[1]} $A", pair=f"{names[1]} $A {names[1]} $B", special_tokens=[(names[1], pieces.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=package, unk_token=names[0], bos_token=names[1], eos_token=names[2], pad_token=names[0]
    )


def harness_ids(tokenizer: Any, asked: Sequence[Request]) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of context and continuation as `TemplateLM` and `HFLM` of the harness make them."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix

    class Ids(TemplateLM):
        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = tokenizer.bos_token_id
        loglikelihood_rolling = generate_until = None

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if add_special_tokens is None and has_bos_prefix(string, tokenizer.bos_token):
                add_special_tokens = False
            ids: list[int] = tokenizer.encode(string, add_special_tokens=add_special_tokens is None)
            return ids

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[Any]:
            return [(context, continuation) for _, context, continuation in requests]

    yield from Ids().loglikelihood([instance(request) for request in asked], disable_tqdm=True)


def instance(request: Request) -> Any:
    """A request of lm-eval."""
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=tuple(request), idx=0)


def plain(model: OpenELM, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Answer:
    """One pass over the ids alone, and the sum in float64."""
    ids = [*context, *continuation][-(max_length + 1) :]
    logits = model(mx.array([ids[:-1]]))[0, -len(continuation) :].astype(mx.float32)
    log_p = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(np.float64)
    places = np.arange(len(continuation))
    return Answer(log_p[places, continuation].sum(), bool((np.array(logits).argmax(-1) == continuation).all()))


def hugging_face(folder: Path, tokenizer: Any, max_length: int) -> Any:
    """`HFLM` of the harness with the weights of a folder in PyTorch."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import torch
    from lm_eval.models.huggingface import HFLM
    from torch_openelm import OpenELM as TorchOpenELM, for_transformers

    model = load_model(folder, dtype=mx.float32)
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    weights = {name: np.array(array) for name, array in arrays.items()}
    torch.set_grad_enabled(False)
    other = for_transformers(TorchOpenELM(model.config, weights), tokenizer.eos_token_id, model.config.vocab_size)
    return HFLM(pretrained=other, tokenizer=tokenizer, max_length=max_length, batch_size=1, device="cpu")


def tokenizer_of(folder: Path, vocab_size: int, place: Path) -> Path:
    """The folder's `tokenizer.model`; one that is trained on made-up words, if there is none."""
    if (folder / "tokenizer.model").exists():
        return folder / "tokenizer.model"
    from sentencepiece import SentencePieceTrainer

    chance = random.Random(0)
    (place / "text.txt").write_text("\n".join(_words(chance, TEXT.split(), 12) for _ in range(400)))
    SentencePieceTrainer.train(
        input=str(place / "text.txt"),
        model_prefix=str(place / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=False,
        num_threads=1,
        minloglevel=2,
    )
    return place / "tokenizer.model"


def compare(folder: Path, count: int, max_length: int, text: str, with_torch: bool, seed: int = 0) -> dict[str, Any]:
    """How far a model's scores are from those of the others."""
    with tempfile.TemporaryDirectory() as place:
        model = load_model(folder, dtype=mx.float32)
        path = tokenizer_of(folder, model.config.vocab_size, Path(place))
        ours = Tokenizer(path, vocab_size=model.config.vocab_size)
        theirs = llama_tokenizer(path)
        encode = RequestEncoder(ours, max_length)
        asked = with_greedy(model, ours, encode, requests(count, max_length, seed, text))
        ids = list(harness_ids(theirs, asked))
        found = [encode(request) for request in asked]
        for request, own, (context, continuation) in zip(asked, found, ids, strict=True):
            whole = [*context, *continuation][-(max_length + 1) :]
            expected = (whole, len(continuation)) if 0 < len(continuation) <= max_length else None
            assert (own and (own.ids.tolist(), own.num_scored)) == expected, request
        kept = [number for number, own in enumerate(found) if own is not None]
        start = time.perf_counter()
        scores = Scorer(model, ours, ScorerConfig(max_length=max_length)).score([asked[number] for number in kept])
        seconds = time.perf_counter() - start
        assert FAILED not in scores
        scored = [Answer(score.log_likelihood, score.is_greedy) for score in scores]
        alone = [plain(model, *ids[number], max_length) for number in kept]
        results: dict[str, Any] = {
            "requests": len(asked),
            "not_scorable": len(asked) - len(kept),
            "truncated": sum(score.is_truncated for score in scores),
            "greedy": sum(score.is_greedy for score in scores),
            "seconds": seconds,
            "plain": differences(kept, asked, scored, alone),
        }
        if with_torch:
            backend = hugging_face(folder, theirs, max_length)
            answers = backend.loglikelihood([instance(asked[number]) for number in kept], disable_tqdm=True)
            results["hugging_face"] = differences(kept, asked, scored, [Answer(*answer) for answer in answers])
        return results


def differences(
    kept: Sequence[int], asked: Sequence[Request], found: Sequence[Answer], others: Sequence[Answer]
) -> dict[str, Any]:
    """The largest difference, and how often the greedy flag and the likeliest choice of a question differ."""
    by_question: dict[int, list[int]] = {}
    for place, number in enumerate(kept):
        by_question.setdefault(number // CHOICES, []).append(place)
    lengths = [max(1, len(asked[number].continuation)) for number in kept]

    def chosen(answers: Sequence[Answer], places: Sequence[int]) -> tuple[int, int]:
        values = [answers[place].log_likelihood for place in places]
        return int(np.argmax(values)), int(np.argmax([v / lengths[p] for v, p in zip(values, places, strict=True)]))

    return {
        "largest": max(
            abs(own.log_likelihood - other.log_likelihood) for own, other in zip(found, others, strict=True)
        ),
        "greedy_differs": sum(own.is_greedy != other.is_greedy for own, other in zip(found, others, strict=True)),
        "questions": len(by_question),
        "choice_differs": sum(chosen(found, of) != chosen(others, of) for of in by_question.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--text", type=Path, help="a file from which texts are taken")
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8") if options.text else ""
    heading = ["", "against", "requests", "truncated", "greedy"]
    heading += ["largest difference, nats", "greedy differs", "choice differs"]
    for folder in options.folders:
        rows = [heading]
        found = compare(folder, options.requests, options.max_length, text, not options.no_torch)
        for title, key in (("one pass each", "plain"), ("HFLM, PyTorch", "hugging_face")):
            if key in found:
                of = found[key]
                counts = [f"{found[name]:,}" for name in ("requests", "truncated", "greedy")]
                differ = f"{of['greedy_differs']:,}", f"{of['choice_differs']:,} of {of['questions']:,}"
                rows.append([folder.name, title, *counts, f"{of['largest']:.1e}", *differ])
        report(f"parity_{folder.name}", rows, found)


if __name__ == "__main__":
    main()
