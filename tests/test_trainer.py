from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conftest import assert_close
from mlx_openelm.errors import TrainingError
from mlx_openelm.training.optimizer import Update
from mlx_openelm.training.pretrain import fresh_trainer


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_make_the_same_step(recipe, corpus, size):
    whole, parts = fresh_trainer(recipe, corpus), fresh_trainer(replace(recipe, micro_batch_size=size), corpus)
    assert parts.take_step() == pytest.approx(whole.take_step(), rel=1e-4)
    for name, p in whole.parameters.items():
        assert_close(parts.parameters[name], p, 1e-4)


def test_an_interrupted_update_is_completed_and_then_reported(recipe, corpus, monkeypatch):
    """The old moments are freed one by one, so an update that has begun cannot be undone."""
    undisturbed, trainer = fresh_trainer(recipe, corpus), fresh_trainer(recipe, corpus)
    finish, presses = Update.finish, [KeyboardInterrupt("first"), KeyboardInterrupt("second")]

    def interrupted(update):
        if presses:
            raise presses.pop(0)
        return finish(update)

    monkeypatch.setattr(Update, "finish", interrupted)
    figures = trainer.take_step()
    monkeypatch.setattr(Update, "finish", finish)
    assert figures == undisturbed.take_step()
    assert trainer.step == 1
    for found, expected in ((trainer.parameters, undisturbed.parameters), (trainer.moments, undisturbed.moments)):
        assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(*map(tree_flatten, (found, expected)), strict=True))
    with pytest.raises(KeyboardInterrupt, match="second"):
        trainer.take_step()
    assert trainer.take_step() == undisturbed.take_step()


@pytest.mark.parametrize("broken", ["moments", "gradients"])
def test_a_step_that_is_not_finite_changes_nothing(recipe, corpus, monkeypatch, broken):
    trainer = fresh_trainer(recipe, corpus)
    trainer.take_step()
    name = "transformer.layers.1.ffn.proj_2.weight"
    if broken == "moments":
        trainer.moments.first[name] = mx.full(trainer.parameters[name].shape, 3e38)
        trainer.moments.second[name] = mx.zeros(trainer.parameters[name].shape)
    else:
        gradients = trainer._gradients
        monkeypatch.setattr(
            trainer, "_gradients", lambda *given: (lambda s, g: (s, {**g, name: g[name] / 0}))(*gradients(*given))
        )
    before = {key: np.array(array) for key, array in tree_flatten((trainer.parameters, trainer.moments))}
    with pytest.raises(TrainingError, match="not finite at step 2"):
        trainer.take_step()
    after = dict(tree_flatten((trainer.parameters, trainer.moments)))
    assert trainer.step == 1
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], np.array(after[key])) for key in before)


def test_documents_that_share_a_row_do_not_see_each_other(recipe, corpus):
    trainer = fresh_trainer(replace(recipe, packing="documents"), corpus)
    model = trainer.current_model()
    tokens = mx.array([[1, 50, 60, 2, 1, 70, 80, 2]])
    shared = model.transformer(tokens, segments=mx.array([[0, 0, 0, 0, 1, 1, 1, 1]]))
    assert_close(shared[:, 4:], model.transformer(tokens[:, 4:]), 1e-5)
    assert_close(shared[:, :4], model.transformer(tokens[:, :4]), 1e-5)


def test_a_batch_that_the_processes_cannot_share_is_refused(recipe, corpus):
    class Three:
        def size(self):
            return 3

        def rank(self):
            return 0

    with pytest.raises(TrainingError, match="4 rows cannot be split over 3"):
        fresh_trainer(recipe, corpus, Three())
