import pytest

from mlx_openelm.evaluation.published import main_metric, published, published_model, published_tables

SIZES = ["270M", "450M", "1.1B", "3B"]
MODELS = [name + kind for name in SIZES for kind in ("", "-Instruct")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apple/OpenELM-270M", "270M"),
        ("apple/OpenELM-1_1B-Instruct", "1.1B-Instruct"),
        ("models/OpenELM-1.1B-4bit", "1.1B"),
        ("OpenELM-3B-Instruct-4bit/", "3B-Instruct"),
        ("openelm_450m", "450M"),
        ("openelm-tiny", None),
        ("OpenELM-30B", None),
        ("OpenELM-3Bx", None),
        ("OpenELM-270M/checkpoints", None),
    ],
)
def test_a_published_model_is_known_by_its_name(name, expected):
    assert published_model(name) == expected


def test_with_an_adapter_a_model_is_another_one():
    assert published_model("apple/OpenELM-270M", has_adapter=True) == "270M-LoRA"
    assert published("270M-LoRA", "commonsense/piqa", 0).percent == 50.05
    assert published("270M-LoRA", "piqa", 0) is None
    assert published("270M", "commonsense/piqa", 0) is None
    assert published("450M-LoRA", "commonsense/piqa", 0) is None


def test_a_figure_depends_on_the_number_of_shots():
    assert published("270M", "arc_challenge", 0).percent == 26.45
    assert published("270M", "arc_challenge", 25).percent == 27.65
    assert published("270M", "arc_challenge", 5) is None
    assert published("270M", "nonsense", 0) is None
    assert published(None, "piqa", 0) is None


def test_a_figure_names_the_first_of_the_tables_given():
    tables = published_tables()
    source = published("3B", "winogrande", 5, [tables["llm360"], tables["openllm"]]).source
    assert "LLM360; on the model card" in source
    assert published("3B", "winogrande", 5).source == tables["openllm"].source


def test_a_commonsense_task_needs_its_prefix_only_where_another_has_its_name():
    assert published("270M-LoRA", "social_i_qa", 0).percent == 42.02
    assert published("270M-LoRA", "ARC-Easy", 0).percent == 26.60
    assert published("270M-LoRA", "boolq", 0) is None


def test_figures_become_items():
    assert published("270M", "boolq", 0).num_right == 1765
    assert published("270M", "arc_challenge", 0).num_right == 310
    assert published("270M", "crows_pairs_english", 25).num_right == 1120
    assert published("270M", "mmlu", 5).num_right == 3612
    assert published("270M", "truthfulqa_mc2", 0).num_right == pytest.approx(320.6, abs=0.01)  # a sum of probabilities


@pytest.mark.parametrize("name", ["zero-shot", "openllm", "llm360"])
def test_tables_have_all_models(name):
    assert list(published_tables()[name].models) == MODELS


@pytest.mark.parametrize("name", list(published_tables()))
def test_figures_are_whole_numbers_of_items_and_averages_are_theirs(name):
    """A digit that was copied wrongly would hardly be either."""
    table = published_tables()[name]
    for model, row in table.models.items():
        for cell, percent in zip(table.cells, row, strict=False):
            exact = 100 * published(model, cell.task, cell.shots, [table]).num_right / cell.num_items
            assert exact == pytest.approx(percent, abs=0.00501), (model, cell)
        figures, average = row[:-1], row[-1]
        assert sum(figures) / len(figures) == pytest.approx(average, abs=0.0065), model  # of rounded figures


def test_tables_agree_where_they_print_the_same_figure():
    seen = {}
    for table in published_tables().values():
        for place, cell in enumerate(table.cells):
            for model, row in table.models.items():
                assert seen.setdefault((model, cell.task, cell.shots), row[place]) == row[place]


def test_a_task_has_a_metric_by_which_it_is_known():
    assert main_metric("arc_easy", ["acc", "acc_norm"]) == "acc_norm"
    assert main_metric("sciq", ["acc", "acc_norm"]) == "acc"
    assert main_metric("commonsense/piqa", ["acc", "acc_norm"]) == "acc"
    assert main_metric("piqa", ["acc", "acc_norm"]) == "acc_norm"
    assert main_metric("truthfulqa_mc2", ["mc2"]) == "mc2"
    assert main_metric("my-task", ["acc_norm", "acc"]) == "acc_norm"
