import math
import re

import mlx.core as mx
import mlx.nn as nn
import pytest

from conftest import assert_close, random_model
from mlx_openelm.errors import ConfigError
from mlx_openelm.training.dpo import DPO, row_logprobs, row_sums
from mlx_openelm.training.loss import at_positions

CHOSEN, REJECTED = math.log(0.5), math.log(0.25)  # log-probabilities of the answers of one token


class Flat:
    """A network whose logits are given."""

    @staticmethod
    def logits(hidden):
        return hidden


def one_pair(reference):
    hidden = mx.log(mx.array([[[0.5, 0.3, 0.2]], [[0.25, 0.35, 0.4]]]))
    batch = {
        "inputs": mx.array([[1], [1]]),
        "targets": mx.array([0, 0]),
        "weights": mx.array([1.0, 1.0]),
        "rows": mx.array([0, 1]),
        "reference": mx.array(reference),
    }
    return hidden, batch


@pytest.mark.parametrize(
    ("loss", "reference", "margin", "expected", "slope"),
    [
        # margin = 0.5 * ((log 0.5 - log 0.4) - (log 0.25 - log 0.5)) = 0.5 * log 2.5
        ("sigmoid", [0.4, 0.5], 0.5 * math.log(2.5), math.log(1 + 2.5**-0.5), -1 / (1 + 2.5**0.5)),
        ("hinge", [0.4, 0.5], 0.5 * math.log(2.5), 1 - 0.5 * math.log(2.5), -1.0),
        ("hinge", [0.01, 0.9], 0.5 * math.log(180), 0.0, 0.0),  # beyond 1: nothing left to gain
        ("sigmoid", [0.5, 0.25], 0.0, math.log(2), -0.5),  # as it was: the loss of a coin
        ("hinge", [0.5, 0.25], 0.0, 1.0, -1.0),
    ],
)
def test_losses_and_gradients_by_hand(loss, reference, margin, expected, slope):
    hidden, batch = one_pair([math.log(p) for p in reference])
    objective = DPO(beta=0.5, loss=loss)
    sums, _ = objective(Flat, hidden, batch, False)
    assert sums.tolist() == pytest.approx([expected, margin, float(margin > 0), 1.0], abs=1e-6)
    gradient = mx.grad(lambda hidden: objective(Flat, hidden, batch, False)[1])(hidden)
    # d loss / d logits of an answer is slope * beta * (one-hot - probabilities), of the rejected one the opposite.
    by_hand = [[0.5 * slope * (1 - 0.5), -0.5 * slope * 0.3, -0.5 * slope * 0.2],
               [-0.5 * slope * (1 - 0.25), 0.5 * slope * 0.35, 0.5 * slope * 0.4]]  # fmt: skip
    assert_close(gradient[:, 0], mx.array(by_hand), 1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
@pytest.mark.parametrize("trains_output", [True, False])
def test_gradients_are_those_of_mlxs_own_differentiation(tiny_config, loss, trains_output):
    model = random_model(tiny_config)
    tokens = mx.random.randint(0, 400, (4, 9), key=mx.random.key(0))
    weights = (mx.arange(8) >= 3).astype(mx.float32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:].reshape(-1),
        "weights": mx.concatenate([weights] * 4),
        "rows": mx.repeat(mx.arange(4), 8),
        "reference": mx.array([-30.0, -31.0, -29.0, -33.0]),
    }
    objective = DPO(beta=0.1, loss=loss, chunk=7)
    if not trains_output:
        model.freeze()
        model.transformer.norm.unfreeze()

    def plain():
        logprobs = -nn.losses.cross_entropy(model(batch["inputs"]), tokens[:, 1:])
        gained = (logprobs * weights).sum(axis=1) - batch["reference"]
        margins = 0.1 * (gained[0::2] - gained[1::2])
        losses = mx.logaddexp(0.0, -margins) if loss == "sigmoid" else mx.maximum(0.0, 1 - margins)
        return losses.sum()

    def ours():
        return objective(model, model.transformer(batch["inputs"]), batch, trains_output)[1]

    value, expected = nn.value_and_grad(model, plain)()
    sums, _ = objective(model, model.transformer(batch["inputs"]), batch, trains_output)
    assert sums[0].item() == pytest.approx(value.item(), rel=1e-5)
    _, found = nn.value_and_grad(model, ours)()
    for (name, one), (_, other) in zip(nn.utils.tree_flatten(found), nn.utils.tree_flatten(expected), strict=True):
        assert_close(one, other, 1e-4 * max(1.0, mx.abs(other).max().item())), name


def test_pairs_of_padding_do_not_count():
    hidden, batch = one_pair([0.0, 0.0])
    sums, _ = DPO()(Flat, hidden, batch | {"weights": mx.zeros(2)}, False)
    assert sums.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_log_probabilities_are_summed_by_row():
    hidden, batch = one_pair([0.0, 0.0])
    assert_close(row_logprobs(Flat, hidden, batch), mx.array([CHOSEN, REJECTED]), 1e-6)
    assert at_positions(hidden, batch).shape == (2, 3)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"loss": "square"}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ConfigError):
        DPO(**options)


def test_the_hinge_loss_is_flat_from_a_margin_of_1_on():
    losses, slopes = DPO(loss="hinge").of_margins(mx.array([-1.0, 0.5, 1.0, 3.0]))
    assert (losses.tolist(), slopes.tolist()) == ([2.0, 0.5, 0.0, 0.0], [-1.0, -1.0, 0.0, 0.0])


def test_the_slope_of_the_sigmoid_loss_is_its_derivative():
    margins = mx.array([-3.0, 0.0, 0.7, 40.0])
    losses, slopes = DPO().of_margins(margins)
    expected = mx.grad(lambda margins: mx.logaddexp(mx.zeros(()), -margins).sum())(margins)
    assert_close(slopes, expected, 1e-6)
    assert_close(losses, mx.log1p(mx.exp(-margins)), 1e-6)


def test_defaults_are_those_of_apples_recipes():
    assert (DPO().beta, DPO().loss, DPO.names) == (0.01, "sigmoid", ("loss", "margin", "accuracy"))


def test_row_sums_by_hand():
    sums = row_sums(mx.array([1.0, 2.0, 4.0, 8.0]), mx.array([2, 0, 2, 0]), 4)
    assert sums.tolist() == [10.0, 0.0, 5.0, 0.0]


def test_no_sum_depends_on_the_order_in_which_a_gpu_scatters(tmp_path):
    """On GPUs a scatter adds with atomic operations: only where each place gets one value is the sum the same."""
    hidden, batch = one_pair([0.4, 0.5])
    objective = DPO(0.5)
    gradient = mx.grad(lambda hidden: objective(Flat, hidden, batch, trains_output=False)[1])(hidden)
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), objective(Flat, hidden, batch, trains_output=False)[0], gradient)
    labels = re.findall(r'label ="(\w+)', path.read_text())
    assert "Sum" in labels
    assert labels.count("Scatter") == 1  # of the logits' gradient, one target per row
