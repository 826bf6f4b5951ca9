"""What `pretrain` prints before it starts."""

from dataclasses import replace

import pytest

from mlx_openelm.commands.pretrain_plan import describe, duration
from mlx_openelm.training.memory import StepMemory
from mlx_openelm.training.plan import Plan


@pytest.fixture
def plan(recipe):
    memory = StepMemory(1 << 20, 2 << 20, 3 << 20, 1 << 30)
    return Plan(replace(recipe, steps=100_000), 3, 900_000, 1000, 10_000, 12, True, memory, 500.0, 2)


def test_a_plan_fits_a_terminal_and_says_what_the_run_needs(plan, capsys):
    describe(plan)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "data", "held", "steps", "rate", "memory", "time"]
    assert max(map(len, lines)) <= 80
    assert "900,000 tokens, 1,000 documents, 3 files" in lines[1]
    assert "100,000 of 4 rows of 16 tokens: 6,400,000 tokens, 7.1 epochs" in lines[3]
    assert "about 6.0 MiB" in lines[5]
    assert lines[6].endswith("about 1.9 hours; a trial made 1,000 tokens/s")


def test_a_resumed_run_says_what_is_left(plan, capsys):
    describe(replace(plan, steps_taken=90_000))
    assert "about 11 min for the 10,000 steps left;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"held_out_documents": 0}, "no document is held out for validation"),
        ({"memory": StepMemory(1, 1, 1, 2)}, "not enough memory; try a smaller --micro-batch-size"),
    ],
)
def test_what_may_disappoint_is_a_warning(plan, capsys, change, said):
    describe(replace(plan, **change))
    assert f"warning: {said}" in capsys.readouterr().err


def test_a_run_with_few_tokens_for_its_size_is_a_warning(plan, capsys):
    describe(replace(plan, recipe=replace(plan.recipe, steps=10)))
    assert "tokens per parameter are few, 20 are usual" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.1, "1 s"), (75, "75 s"), (600, "10 min"), (7200, "2 hours"), (100_000, "28 hours"), (1e6, "12 days")],
)
def test_a_time_has_the_unit_that_suits_it(seconds, said):
    assert duration(seconds) == said
