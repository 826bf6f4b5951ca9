import json
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conftest import GOLDEN, GOLDEN_CASES, assert_close, random_model
from mlx_openelm import ContextLengthWarning, generate_tokens, load_model, read_config
from mlx_openelm.cache.layouts import attention
from mlx_openelm.conversion.open import open_source
from mlx_openelm.loading import load_source
from mlx_openelm.machine.device import choices, replaced_choices
from mlx_openelm.model.forward_context import blockwise_attention, segment_mask

TOLERANCE = 2e-5  # float32 against PyTorch's float32, on logits of size 1 to 10


def golden_sources(case):
    return [GOLDEN / case, GOLDEN / case / "corenet_checkpoint.pt"]


@pytest.mark.parametrize("case", GOLDEN_CASES)
@pytest.mark.parametrize("form", [0, 1], ids=["huggingface", "corenet"])
class TestGoldenNumbers:
    """Against what Apple's PyTorch code computes."""

    def load(self, case, form):
        expected = mx.load(str(GOLDEN / case / "expected.safetensors"))
        model = load_model(golden_sources(case)[form], dtype=mx.float32)
        return model, expected

    def test_logits(self, case, form):
        model, expected = self.load(case, form)
        assert_close(model(expected["input_ids"]), expected["logits"], TOLERANCE)

    def test_greedy_tokens(self, case, form):
        model, expected = self.load(case, form)
        wanted = expected["greedy_tokens"][0].tolist()
        steps = generate_tokens(model, expected["greedy_prompt"][0], max_tokens=len(wanted))
        assert [step.token for step in steps] == wanted


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_loss_and_every_gradient_norm(case):
    """As CoreNet trained: the rows that fill the vocabulary take part in the softmax."""
    source = open_source([GOLDEN / case / "corenet_checkpoint.pt"])
    model = load_source(source, mx.float32)
    expected = mx.load(str(GOLDEN / case / "expected.safetensors"))
    numbers = json.loads((GOLDEN / case / "expected.json").read_text())
    assert model.config.vocab_size == numbers["corenet_vocab"]
    inputs, targets = expected["input_ids"][:, :-1], expected["targets"]
    counted = targets != numbers["ignore_index"]

    def losses(model):
        logits = model(inputs)
        log_z = mx.logsumexp(logits, axis=-1)
        picked = mx.take_along_axis(logits, mx.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
        cross_entropy = mx.sum(mx.where(counted, log_z - picked, 0)) / mx.sum(counted)
        z_loss = numbers["z_loss_eps"] * mx.sum(mx.where(counted, log_z**2, 0)) / mx.sum(counted)
        return cross_entropy, z_loss

    cross_entropy, z_loss = losses(model)
    assert cross_entropy.item() == pytest.approx(numbers["loss"]["ce_loss"], rel=1e-3)
    assert z_loss.item() == pytest.approx(numbers["loss"]["z_loss_valid_tokens_only"], rel=1e-3)

    _, gradients = nn.value_and_grad(model, lambda: sum(losses(model)))()
    found = {corenet_name(name): mx.linalg.norm(g).item() for name, g in tree_flatten(gradients)}
    assert found == pytest.approx(numbers["grad_norms"], rel=1e-3)


def corenet_name(name):
    return name.replace("lm_head.", "classifier.").removeprefix("transformer.")


def test_decoding_one_token_at_a_time_matches_a_single_pass(tiny_model):
    tokens = mx.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    cache = tiny_model.make_cache()
    steps = [tiny_model(tokens[:, i : i + 1], cache=cache) for i in range(6)]
    assert cache.offset == 6
    assert_close(mx.concatenate(steps, axis=1), tiny_model(tokens), atol=1e-5)  # float32


@pytest.mark.parametrize("sizes", [(5, 1, 4), (1, 9), (9, 1), (3, 3, 3, 1)])
def test_chunks_of_any_size_match_a_single_pass(tiny_model, sizes):
    tokens = mx.arange(10)[None] * 7 % 400
    cache = tiny_model.make_cache()
    steps, start = [], 0
    for size in sizes:
        steps.append(tiny_model(tokens[:, start : start + size], cache=cache))
        start += size
    assert_close(mx.concatenate(steps, axis=1), tiny_model(tokens), atol=1e-5)


def test_a_cache_that_grew_keeps_its_tokens(tiny_config):
    model = random_model(replace(tiny_config, max_context_length=1000))
    tokens = mx.random.randint(0, 400, (1, 300), key=mx.random.key(1))
    cache = model.make_cache()
    starts = [0, 250, 251, 258, 290]
    parts = [model(tokens[:, i:j], cache=cache) for i, j in pairwise([*starts, 300])]
    assert_close(mx.concatenate(parts, axis=1), model(tokens), atol=2e-5)


def test_trimming_a_cache_takes_back_its_last_tokens(tiny_model):
    tokens = mx.array([[5, 6, 7, 8]])
    cache = tiny_model.make_cache()
    tiny_model(mx.array([[5, 6, 99, 98, 97]]), cache=cache)
    cache.trim(3)
    assert_close(tiny_model(tokens[:, 2:], cache=cache), tiny_model(tokens)[:, 2:], atol=1e-5)


def test_text_past_the_trained_context_warns_once(tiny_model):
    cache = tiny_model.make_cache()
    tiny_model(mx.zeros((1, 250), mx.int32), cache=cache)
    with pytest.warns(ContextLengthWarning, match="256 positions"):
        logits = tiny_model(mx.zeros((1, 10), mx.int32), cache=cache)
    assert mx.all(mx.isfinite(logits)).item()
    tiny_model(mx.zeros((1, 1), mx.int32), cache=cache)  # warnings are errors in these tests: no second one


@pytest.mark.parametrize("segments", [None, mx.array([[0] * 100 + [1] * 30 + [2] * 170])], ids=["one", "three"])
def test_attention_in_training_is_that_of_inference(tiny_config, segments):
    model = random_model(replace(tiny_config, max_context_length=1000))
    tokens = mx.random.randint(0, 400, (1, 300), key=mx.random.key(1))
    assert tokens.shape[1] > 2 * choices().attention_block
    in_training = model.train().transformer(tokens, segments=segments)
    assert_close(in_training, model.eval().transformer(tokens, segments=segments), atol=2e-5)


@pytest.mark.parametrize("isolated", [False, True], ids=["one document", "three documents"])
class TestBlockwiseAttention:
    HEADS = tuple(mx.random.normal((1, heads, 300, 8), key=mx.random.key(heads)) for heads in (4, 2, 2))
    SEGMENTS = mx.array([[0] * 100 + [1] * 130 + [2] * 70])

    def gradients(self, read, isolated):
        """Of queries, keys and values, in a compiled function that computes the mask itself, as a step does."""

        def total(queries, keys, values, segments):
            mask = segment_mask(segments) if isolated else None
            return mx.square(read(queries, keys, values, mask)).sum()

        return mx.compile(mx.grad(total, argnums=(0, 1, 2)))(*self.HEADS, self.SEGMENTS)

    @pytest.mark.parametrize("block", [7, 128, 512])
    def test_gradients_are_those_of_whole_attention(self, isolated, block):
        expected = self.gradients(attention, isolated)
        with replaced_choices(attention_block=block):
            for found, whole in zip(self.gradients(blockwise_attention, isolated), expected, strict=True):
                assert_close(found, whole, 1e-4)

    def test_only_queries_keys_and_values_are_differentiated(self, isolated, monkeypatch):
        """The backward pass of CUDA's fused attention refuses to differentiate a mask."""
        counts = []
        checkpoint = mx.checkpoint

        def counting(function):
            checkpointed = checkpoint(function)
            return lambda *arguments: counts.append(len(arguments)) or checkpointed(*arguments)

        monkeypatch.setattr(mx, "checkpoint", counting)
        with replaced_choices(attention_block=128):
            self.gradients(blockwise_attention, isolated)
        assert counts == [3, 3, 3]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_ways_of_gpus_and_of_the_cpu_agree(tiny_model, compiled):
    """Heads are normed and rotated apart or together, by MLX's operations or by a table: whichever is faster there."""
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    options = {"max_tokens": 20, "compiled": compiled}
    logits, steps = tiny_model(tokens), list(generate_tokens(tiny_model, tokens[0], **options))
    with replaced_choices(backend="metal", fused_kernels=False):
        assert_close(tiny_model(tokens), logits, 1e-5)
        others = list(generate_tokens(tiny_model, tokens[0], **options))
    assert [step.token for step in others] == [step.token for step in steps]
    assert np.allclose([step.logprob for step in others], [step.logprob for step in steps], atol=1e-4)


@pytest.mark.parametrize("sizes", [(10,), (4, 6), (9, 1)])
def test_the_last_state_alone_is_that_of_a_whole_pass(tiny_model, sizes):
    tokens = mx.arange(10)[None] * 7 % 400
    cache, start = tiny_model.make_cache(), 0
    for size in sizes:
        last = tiny_model.transformer(tokens[:, start : start + size], cache, last_only=True)
        start += size
    assert last.shape == (1, 1, 128)
    assert_close(last, tiny_model.transformer(tokens)[:, -1:], 1e-5)


def test_positions_matter(tiny_model):
    """Without RoPE the last of these tokens would see the same set before it in both orders."""
    one, other = tiny_model(mx.array([[1, 2, 3]])), tiny_model(mx.array([[2, 1, 3]]))
    assert mx.abs(one[0, -1] - other[0, -1]).max().item() > 1e-2


@pytest.mark.parametrize("activation", ["swish", "gelu", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_by_hand(tiny_config, activation, gated):
    ffn = (
        random_model(replace(tiny_config, activation_fn_name=activation, ffn_with_glu=gated)).transformer.layers[1].ffn
    )
    x = mx.random.normal((1, 2, 128), key=mx.random.key(3))
    hidden = x @ ffn.proj_1.weight.T
    function = {"swish": nn.silu, "gelu": nn.gelu, "relu": nn.relu}[activation]
    width = tiny_config.ffn_dims[1]
    hidden = function(hidden[..., :width]) * hidden[..., width:] if gated else function(hidden)
    assert_close(ffn(x), hidden @ ffn.proj_2.weight.T, atol=1e-5)


def test_16_bit_models_give_16_bit_logits(tiny_config):
    model = random_model(tiny_config)
    model.set_dtype(mx.bfloat16)
    assert model(mx.array([[1, 2]])).dtype == mx.bfloat16


def test_untied_output_has_its_own_matrix():
    config = read_config(GOLDEN / "untied_mha_noglu" / "config.json")
    assert not config.share_input_output_layers
    assert "lm_head.weight" in dict(tree_flatten(random_model(config).parameters()))
