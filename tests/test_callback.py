"""What a run reports while it goes on."""

from mlx_openelm import TrainingCallback
from mlx_openelm.training.pretrain import pretraining_steps


class Order(TrainingCallback):
    def __init__(self):
        self.events = []

    def on_begin(self, step):
        self.events.append(("begin", step))

    def on_step(self, metrics):
        self.events.append(("step", metrics.step))

    def on_validating(self, done, total):
        self.events.append(("validation", done, total))


def test_a_validation_reports_its_own_progress_and_a_resumed_run_where_it_goes_on(tmp_path, recipe, corpus, tokenizer):
    callback = Order()
    steps = pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run", callback=callback)
    for _ in range(7):
        next(steps)
    steps.close()
    assert callback.events[:6] == [("begin", 0), *(("step", step) for step in range(1, 6))]
    assert callback.events[6:] == [*(("validation", done, 4) for done in range(5)), ("step", 6), ("step", 7)]
    again = Order()
    list(pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run", resume=True, callback=again))
    assert again.events[:2] == [("begin", 7), ("step", 8)]
    assert again.events[-1] == ("step", 12)
