import copy
import json
from itertools import combinations
from pathlib import Path

import pytest

from conftest import draw, graded, refused, run
from mlx_openelm.errors import OutputError, OutputExistsError, TrainingError
from mlx_openelm.evaluation.picture import draw_picture, save_picture
from mlx_openelm.evaluation.report import EvaluationReport
from mlx_openelm.evaluation.results import TaskResult
from mlx_openelm.model.design import design, fit
from mlx_openelm.plot import Accuracy, percent, plot_accuracies, plot_bench, plot_design, plot_run
from mlx_openelm.runs import read_metrics

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "sizes.json"
LONG = "a-name-that-someone-gave-because-it-says-all-the-settings-learning-rate-3e-4-batch-32"


def write_run(folder, steps=30, evaluated=()):
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step,
            "loss": 8 / step,
            "learning_rate": 1e-3,
            "gradient_norm": 1 / step,
            "tokens": 1000 * step,
            "tokens_per_second": 2000.0,
            "validation_loss": 8 / step + 0.1 if step % 10 == 0 else None,
            **{f"evaluation_{name}": 0.5 - 0.01 * at for at, name in enumerate(evaluated) if step % 10 in (0, 1)},
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_drawn_with_its_units(tmp_path):
    draw(plot_run, write_run(tmp_path / "stories"), tmp_path / "run.svg")
    drawn = (tmp_path / "run.svg").read_text()  # text is drawn as shapes, with the words in comments
    for words in ("Training run stories", "nats per token", "tokens per second", "held-out", "learning rate", "step"):
        assert f"<!-- {words}" in drawn, words


def test_a_run_without_validation_is_drawn(tmp_path):
    draw(plot_run, write_run(tmp_path / "stories", steps=2), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_damage_is_named(tmp_path):
    with pytest.raises(TrainingError, match="not a training run"):
        read_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    with pytest.raises(TrainingError, match="is empty"):
        read_metrics(tmp_path)
    for text in ('{"step": 1', '{"step": 1}', "[]", "3"):
        path.write_text(text + "\n")
        with pytest.raises(TrainingError, match=r"metrics\.jsonl, line 1"):
            read_metrics(tmp_path)


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(OutputError, match=r"run\.frob cannot be written"):
        draw(plot_run, write_run(tmp_path / "stories"), tmp_path / "run.frob")


def test_the_command_says_what_it_wrote(tmp_path):
    folder = write_run(tmp_path / "stories")
    status, out, err = run("plot", folder)
    assert (status, out, err) == (0, f"{folder / 'metrics.png'}\n", "")
    drawn = (folder / "metrics.png").read_bytes()
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    assert run("plot", folder)[0] == 0
    assert (folder / "metrics.png").read_bytes() != drawn


def test_another_picture_is_replaced_only_by_force(tmp_path):
    folder = write_run(tmp_path / "stories")
    (folder / "metrics.png").write_bytes(b"a picture of somebody's")
    assert "metrics.png already exists; use --force" in refused("plot", folder)
    assert (folder / "metrics.png").read_bytes() == b"a picture of somebody's"
    assert run("plot", folder, "--force")[0] == 0
    assert "already exists" in refused("plot", folder, "--output", folder / "metrics.png")
    assert "not a training run" in refused("plot", tmp_path / "missing")


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The figure that a function draws, laid out."""
    figures = pytest.importorskip("matplotlib.figure")
    seen = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *of, **more: (seen.append(self), save(self, *of, **more))
    )

    def call(function, what):
        draw(function, what, tmp_path / "picture.png")
        return seen[-1]

    return call


def check_layout(figure):
    """Everything is inside the picture, no text lies on another, and no legend on the data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    texts = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axis in figure.axes:
        assert axis.get_legend() is None
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for line, ends in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            texts += [tick.label1 for tick in line.get_major_ticks() if min(ends) <= tick.get_loc() <= max(ends)]
    boxes = {text: text.get_window_extent(renderer) for text in texts if text.get_visible() and text.get_text()}
    for text, box in boxes.items():
        assert box.x0 >= 0 <= box.y0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        assert not first.padded(-0.5).overlaps(second.padded(-0.5)), (one, other)
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    assert not any(box.overlaps(axis.get_window_extent(renderer)) for axis in figure.axes)
    assert figure.bbox.width == 800


@pytest.mark.parametrize(("name", "steps"), [("one", 1), ("ten", 10), (LONG, 60)])
def test_the_layout_of_a_run(drawn, tmp_path, name, steps):
    figure = drawn(plot_run, write_run(tmp_path / name, steps))
    check_layout(figure)
    loss, *others = figure.axes
    labels = [line.get_label() for line in loss.lines]
    assert ("training, smoothed" in labels) == (steps >= 40)
    few = [line for axis in figure.axes for line in axis.lines if len(line.get_xdata()) < 11]
    assert all(line.get_marker() == "o" for line in few)  # or they would not show
    assert len(others) == 3


@pytest.mark.parametrize("names", [["sciq"], ["average", "arc_easy", "commonsense/piqa", LONG, *"abcdefgh"]])
@pytest.mark.parametrize("steps", [1, 60])
def test_the_layout_of_a_run_with_evaluations(drawn, tmp_path, names, steps):
    figure = drawn(plot_run, write_run(tmp_path / "run", steps, names))
    check_layout(figure)
    *_, evaluation = figure.axes
    assert len(figure.axes) == 5
    assert evaluation.get_title() == "Evaluation"
    assert evaluation.get_ylabel() == names[0]
    assert len(evaluation.lines) == min(9, len(names))
    assert list(evaluation.lines[0].get_xdata())[:2] == ([1] if steps == 1 else [1, 10])
    assert len({line.get_color() for line in evaluation.lines}) == len(evaluation.lines)
    (legend,) = figure.legends
    assert names[0] in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("parameters", [5e6, 3e9])
def test_the_layout_of_a_design(drawn, parameters):
    check_layout(drawn(plot_design, design(fit(int(parameters), vocab_size=4096))))


@pytest.mark.parametrize("results", ["one", "many"])
def test_the_layout_of_a_benchmark(drawn, results):
    report = json.loads(RESULTS.read_text())
    if results == "one":
        report["results"] = report["results"][1:2]
        del report["results"][0]["figures"]["mlx-lm"]
    if results == "many":
        more = copy.deepcopy(report["results"])
        for result in more:
            result["model"] = LONG
            result["case"]["cache"]["bits"] = 8
            result["case"]["prompt_tokens"] = 2048
        report["results"] += more
    figure = drawn(plot_bench, report)
    check_layout(figure)
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert len(labels) == len(report["results"])
    assert "4\N{NO-BREAK SPACE}bits" in labels[0 if results == "one" else 1]
    assert ("KV" in labels[0]) == (results == "many")
    assert figure.legends[0].get_texts()[-1].get_text() == "limit of the memory or cache (100%)"


def test_small_shares_have_a_decimal():
    assert [percent(share) for share in (0.0071, 0.0999, 0.13, 1.0)] == ["0.7%", "10.0%", "13%", "100%"]


def evaluation_of(tasks, model="apple/OpenELM-270M", items=40, **more):
    """A report with made-up results, the first of which has a truncated item."""
    results = []
    for number, (task, shots, metric) in enumerate(tasks):
        likelihoods = [[-1 - (place + number) % 3, -2] for place in range(items)]
        graded_items = graded(likelihoods, [(place % 2,) for place in range(items)], metrics=[metric])
        graded_items += graded([[-1, -2]], metrics=[metric], start=items, is_truncated=number == 0)
        results.append(TaskResult.of(task, graded_items, metric=metric, shots=shots))
    return EvaluationReport(model, more.pop("adapter", None), "float32", "paper", tuple(results), **more)


LLM360 = [
    ("arc_challenge", 25, "acc_norm"),
    ("crows_pairs_english", 25, "pct_stereotype"),
    ("hellaswag", 10, "acc_norm"),
    ("mmlu", 5, "acc"),
    ("piqa", 0, "acc_norm"),
    ("race", 0, "acc"),
    ("truthfulqa_mc2", 0, "mc2"),
    ("winogrande", 5, "acc"),
]


@pytest.mark.parametrize("number", [1, 8])
def test_the_layout_of_an_evaluation(drawn, number):
    figure = drawn(draw_picture, evaluation_of(LLM360[:number]))
    check_layout(figure)
    (axis,) = figure.axes
    texts = [text.get_text() for text in axis.texts]
    assert "27.65" in texts  # published
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    assert labels[0].split() == ["arc_challenge,", "acc_norm", "(1", "truncated)"]
    assert "(1\N{NO-BREAK SPACE}truncated)" in labels[0]
    averages = ["openllm average (!)", "llm360 average (!)"] if number == 8 else []
    assert [name for name in labels if "average" in name] == averages
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "accuracy, with its standard error",
        "published",
        "always the most frequent position",
    ]


def test_the_layout_of_an_evaluation_with_long_names(drawn):
    mine, arc = f"mine/{LONG}", "commonsense/ARC-Challenge"
    report = evaluation_of([(mine, 0, "acc"), (arc, 0, "acc"), (arc, 5, "acc")], LONG, adapter=LONG, limit=40)
    figure = drawn(draw_picture, report)
    check_layout(figure)
    assert "the first 40 items" in figure._suptitle.get_text().replace("\n", " ")
    assert any("5\N{NO-BREAK SPACE}shots" in tick.get_text() for tick in figure.axes[0].get_yticklabels())


def test_the_layout_of_extreme_accuracies(drawn):
    bars = [Accuracy("all", 100.0, 0.0, 100.0, 100.0), Accuracy("none", 0.0, 0.0, 0.0), Accuracy("no", float("nan"))]
    figure = drawn(lambda of, picture: plot_accuracies("extremes", of, picture), bars)
    check_layout(figure)
    texts = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert texts == ["100.00", "100.00", "0.00", "0.00", "no number"]


def test_a_picture_of_an_evaluation_is_a_new_file(tmp_path):
    report = evaluation_of(LLM360[:2])
    save_picture(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputExistsError):
        save_picture(report, str(tmp_path / "a.png"))
    save_picture(report, tmp_path / "a.png", overwrite=True)
    with pytest.raises(OutputError, match="unsupported image format"):
        save_picture(report, tmp_path / "a.frob")
