from dataclasses import replace

import mlx.core as mx
import pytest

from conftest import assert_close
from mlx_openelm.errors import TrainingError
from mlx_openelm.training.pretrain import fresh_trainer


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_make_the_same_step(recipe, corpus, size):
    whole, parts = fresh_trainer(recipe, corpus), fresh_trainer(replace(recipe, micro_batch_size=size), corpus)
    assert parts.take_step() == pytest.approx(whole.take_step(), rel=1e-4)
    for name, p in whole.parameters.items():
        assert_close(parts.parameters[name], p, 1e-4)


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
