"""lm-eval runs any of its tasks on a model of this package; parity with it is that of `benchmarks/parity.py`."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN, GOLDEN_CASES, SMALL_CONFIG, launched, random_model, refused, run, write_folder
from mlx_openelm import Tokenizer, load
from mlx_openelm.commands.evaluate_harness import refuse_with_harness
from mlx_openelm.errors import EvaluationError, MissingPackageError, TaskError, TokenizerError
from mlx_openelm.evaluation.encoding import RequestEncoder
from mlx_openelm.evaluation.harness_run import HarnessOptions, HarnessTasks, evaluate_harness, harness_notes
from mlx_openelm.evaluation.requests import Request
from mlx_openelm.evaluation.run import Subject
from mlx_openelm.evaluation.score_file import ScoreFile, TextFile
from mlx_openelm.evaluation.scorer import FAILED, Scorer, ScorerConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import parity

CONFIG = replace(SMALL_CONFIG, max_context_length=128)
WORDS = ("the", "fox", "river", "house", "cold", "stones", "water", "garden", "red", "morning")

CHOICE = """
task: made_up_choice
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
fewshot_split: test
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXT = """
task: made_up_text
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["a"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: made_up_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
BROKEN = "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\n"
NAMES = "made_up_choice,made_up_text,made_up_rolling"


def documents(count):
    chance = random.Random(0)
    say = lambda number: " ".join(chance.choice(WORDS) for _ in range(number))  # noqa: E731
    return [
        {"question": say(6) + "?", "choices": [say(2) for _ in range(4)], "answer": chance.randrange(4)}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model, and task files with their data."""
    place = tmp_path_factory.mktemp("harness")
    write_folder(place / "model", random_model(CONFIG), tokenizer)
    (place / "tasks").mkdir()
    (place / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents(12)))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {place / 'data.jsonl'}}}}}\ntest_split: test\n"
    for name, text in (("choice", CHOICE), ("text", TEXT), ("rolling", ROLLING)):
        (place / "tasks" / f"{name}.yaml").write_text(text + data + "metadata: {version: 1.0}\n")
    (place / "tasks" / "broken.yaml").write_text(BROKEN)
    return place


@pytest.fixture(scope="module")
def loaded(place):
    return load(place / "model")


class TestParity:
    """With the ids of the harness's rules on a tokenizer of another package, and one plain pass per request."""

    MAX_LENGTH = 128

    def test_ids_and_scores_of_random_requests(self, place, loaded, tokenizer):
        model, _ = loaded
        asked = parity.requests(100, self.MAX_LENGTH)
        scores = Scorer(model, tokenizer, ScorerConfig(max_length=self.MAX_LENGTH)).score(asked)
        other = parity.llama_tokenizer(tokenizer.path)
        assert sum(score.is_truncated for score in scores) > 1
        for request, score in zip(asked, scores, strict=True):
            context, continuation = ids_by_the_rules(other, request)
            if not 0 < len(continuation) <= self.MAX_LENGTH:
                assert score is FAILED
                continue
            expected = parity.plain(model, context, continuation, self.MAX_LENGTH)
            assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4), request
            assert score.is_greedy == expected.is_greedy

    def test_the_requests_hold_every_kind(self):
        asked = parity.requests(2000, 2048)
        assert len(asked) == 2000 > len(set(asked)) > 1500
        for has in (
            lambda request: not request.context,
            lambda request: request.context and not request.context.strip(),
            lambda request: request.context.endswith("\n"),
            lambda request: len(request.context.split()) > 1500,
            lambda request: request.context[-1:].isalpha() and request.continuation[:1].isalpha(),
            lambda request: "😀" in request.continuation,
            lambda request: "e\u0301" in request.context,
        ):
            assert sum(map(bool, map(has, asked))) > 10

    @pytest.mark.torch
    @pytest.mark.slow
    @pytest.mark.parametrize("case", GOLDEN_CASES)
    def test_with_the_backend_for_hugging_face_models(self, case):
        pytest.importorskip("lm_eval")
        pytest.importorskip("torch")
        found = parity.compare(GOLDEN / case, 200, 256, "", with_torch=True)
        for other, allowed in (("plain", 1e-4), ("hugging_face", 1e-3)):
            assert found[other]["largest"] < allowed
            assert (found[other]["greedy_differs"], found[other]["choice_differs"]) == (0, 0)


def scorable(tokenizer, requests):
    """Those whose continuation has tokens, and not too many."""
    encode = RequestEncoder(tokenizer, 128)
    return [request for request in requests if encode(request) is not None]


def ids_by_the_rules(tokenizer, request):
    """`TemplateLM.loglikelihood` in short, where lm-eval may be missing."""
    context, continuation = request
    blanks = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=not text.startswith("<s>"))

    if not request.context:
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        return ([tokenizer.bos_token_id], ids) if ids[0] != tokenizer.bos_token_id else (ids[:1], ids[1:])
    before = encode(context)
    return before, encode(context + continuation)[len(before) :]


def test_without_lm_eval_a_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingPackageError, match=r"need lm_eval, which is not installed: .* its extra 'evaluate'"):
        HarnessTasks(["arc_easy"])


@pytest.mark.parametrize(
    ("protocol", "values", "name"),
    [
        ("paper", {}, "protocol"),
        ("current", {"compare": "run"}, "compare"),
        ("current", {"picture": "a.png"}, "picture"),
    ],
)
def test_options_of_own_tasks_are_refused(protocol, values, name):
    with pytest.raises(EvaluationError, match=f"`{name}` does not apply to tasks that lm-eval runs"):
        refuse_with_harness(protocol, **values)


def test_the_command_refuses_options_that_do_not_go_together(place):
    assert "--chat requires --harness" in refused("evaluate", "-m", place / "model", "-t", "arc_easy", "--chat")


class TestModel:
    """What lm-eval asks of a model."""

    @pytest.fixture
    def model(self, loaded):
        pytest.importorskip("lm_eval")
        from mlx_openelm.evaluation.harness import HarnessModel

        return HarnessModel(*loaded)

    def asked(self, kind, *arguments):
        from lm_eval.api.instance import Instance

        return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]

    def test_log_likelihoods_are_those_of_the_scorer(self, model, loaded, tokenizer):
        asked = scorable(tokenizer, parity.requests(60, 128))
        found = model.loglikelihood(self.asked("loglikelihood", *map(tuple, asked)))
        scores = Scorer(*loaded).score(asked)
        assert [one[0] for one in found] == pytest.approx([score.log_likelihood for score in scores], abs=1e-4)
        assert [one[1] for one in found] == [score.is_greedy for score in scores]
        assert model.num_truncated == sum(score.is_truncated for score in scores) > 0
        assert model.get_model_info()["num_truncated"] == model.num_truncated

    def test_ids_are_those_of_the_harness_with_another_tokenizer(self, model, tokenizer):
        asked = scorable(tokenizer, parity.requests(200, 128))
        expected = list(parity.harness_ids(parity.llama_tokenizer(tokenizer.path), asked))
        seen = []
        model._loglikelihood_tokens = lambda requests, *_, **__: seen.extend(requests)
        model.loglikelihood(self.asked("loglikelihood", *map(tuple, asked)))
        assert [(context, continuation) for _, context, continuation in seen] == expected

    def test_every_token_of_a_long_text_is_predicted_once(self, model, loaded, tokenizer):
        network, _ = loaded
        chance = random.Random(1)
        text = " ".join(chance.choice(WORDS) for _ in range(200))
        ids = tokenizer.encode(text)
        assert len(ids) > 2 * 128
        expected, start = 0.0, 0
        while start < len(ids):
            end = min(start + 128, len(ids))
            window = ([1, *ids])[end - 128 : end + 1] if start else [1, *ids[:end]]
            expected += parity.plain(network, window[: len(window) - (end - start)], ids[start:end], 128).log_likelihood
            start = end
        found = model.loglikelihood_rolling(self.asked("loglikelihood_rolling", (text,), ("The fox",)))
        assert found[0] == pytest.approx(expected, abs=1e-3)
        assert len(found) == 2

    def test_what_cannot_be_scored_is_refused(self, model):
        with pytest.raises(EvaluationError, match="a continuation must have 1 to 128 tokens; '' has 0"):
            model.loglikelihood(self.asked("loglikelihood", ("The fox", "")))
        with pytest.raises(EvaluationError, match="neither a context nor a continuation"):
            model.loglikelihood(self.asked("loglikelihood", ("", "")))

    def test_known_scores_are_not_computed_again(self, loaded, tmp_path):
        pytest.importorskip("lm_eval")
        from mlx_openelm.evaluation.harness import HarnessModel

        asked = self.asked("loglikelihood", *map(tuple, parity.requests(8, 64)))
        long = self.asked("loglikelihood_rolling", ("The fox ran " * 90,))
        first = HarnessModel(*loaded, scores=ScoreFile(tmp_path / "s", {"weights": "a"}))
        expected = first.loglikelihood(asked), first.loglikelihood_rolling(long)
        again = HarnessModel(*loaded, scores=ScoreFile(tmp_path / "s", {"weights": "a"}))
        assert (again.loglikelihood(asked), again.loglikelihood_rolling(long)) == expected
        assert again._scorer.tokens_computed == 0

    def test_the_response_cache_of_lm_eval_gets_every_answer(self, model):
        told = []
        model.cache_hook.add_partial = lambda *answer: told.append(answer)
        (found,) = model.loglikelihood(self.asked("loglikelihood", ("The fox", " ran")))
        (total,) = model.loglikelihood_rolling(self.asked("loglikelihood_rolling", ("The fox",)))
        settings = {"until": ["\n"], "max_gen_toks": 3}
        (text,) = model.generate_until(self.asked("generate_until", ("The fox", settings)))
        assert told == [
            ("loglikelihood", ("The fox", " ran"), found),
            ("loglikelihood_rolling", ("The fox",), total),
            ("generate_until", ("The fox", settings), text),
        ]

    def test_texts_end_before_a_stop_string(self, model, loaded):
        from mlx_openelm import generate

        (whole,) = model.generate_until(self.asked("generate_until", ("The fox", {"max_gen_toks": 20})))
        assert whole == generate(*loaded, "The fox", max_tokens=20).removeprefix(" ")
        stop = whole[7:9]
        settings = {"until": stop, "max_new_tokens": 20}
        (cut,) = model.generate_until(self.asked("generate_until", ("The fox", settings)))
        assert cut == whole[: whole.index(stop)]

    def test_a_long_prompt_keeps_its_end(self, model):
        context = "The fox ran. " * 60
        ids = model.tok_encode(context)
        short = model.tok_encode(context, left_truncate_len=118)
        assert short == ids[-118:]
        (found,) = model.generate_until(self.asked("generate_until", (context, {"max_gen_toks": 10})))
        assert isinstance(found, str)

    def test_sampled_repeats_differ_and_a_run_that_goes_on_gives_the_same(self, loaded, tmp_path):
        pytest.importorskip("lm_eval")
        from mlx_openelm.evaluation.harness import HarnessModel

        settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
        asked = self.asked("generate_until", *[("The fox", settings)] * 4, ("The river", settings))
        whole = HarnessModel(*loaded, texts=TextFile(tmp_path / "t", {"weights": "a"})).generate_until(asked)
        assert len(set(whole)) > 2
        lines = (tmp_path / "t").read_bytes().splitlines(keepends=True)
        (tmp_path / "t").write_bytes(b"".join(lines[:3]))
        again = HarnessModel(*loaded, texts=TextFile(tmp_path / "t", {"weights": "a"})).generate_until(asked)
        assert again == whole

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_beams": 4}, "a task generates with num_beams=4, which this package does not have"),
            ({"max_gen_toks": 128}, "a task generates up to 128 tokens; with a context of 128"),
        ],
    )
    def test_settings_that_are_not_there_are_refused(self, model, settings, message):
        with pytest.raises(EvaluationError, match=message):
            model.generate_until(self.asked("generate_until", ("The fox", settings)))

    def test_bos_is_added_once(self, model):
        assert model.tok_encode("<s>The fox") == model.tok_encode("The fox")
        assert model.tok_encode("<s>The fox", add_special_tokens=True)[:2] == [1, 1]
        assert model.tok_encode("The fox", add_special_tokens=False) == model.tok_encode("The fox")[1:]
        assert (model.prefix_token_id, model.eot_token_id, model.max_length) == (1, 2, 128)


class TestChat:
    HISTORY = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox "})

    @pytest.fixture
    def model(self, loaded, chat_tokenizer):
        pytest.importorskip("lm_eval")
        from mlx_openelm.evaluation.harness import HarnessModel

        return HarnessModel(loaded[0], chat_tokenizer)

    def test_ids_of_a_templated_prompt_are_those_of_chat(self, model, chat_tokenizer):
        text = model.apply_chat_template(list(self.HISTORY))
        assert model.tok_encode(text) == chat_tokenizer.encode_chat(self.HISTORY)

    def test_a_last_message_can_be_continued(self, model):
        assert model.apply_chat_template(list(self.HISTORY), add_generation_prompt=False).endswith("|>\nThe fox ")

    def test_a_template_that_knows_no_system_is_given_the_rest(self, model, tokenizer_path, loaded):
        from mlx_openelm.evaluation.harness import HarnessModel

        template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        other = Tokenizer(tokenizer_path, chat_template=template + "[{{ m.content }}]{% endfor %}")
        found = HarnessModel(loaded[0], other).apply_chat_template(
            [{"role": "system", "content": "S"}, self.HISTORY[0]]
        )
        assert found == "[Who?]"

    def test_a_base_model_has_none(self, loaded):
        pytest.importorskip("lm_eval")
        from mlx_openelm.evaluation.harness import HarnessModel

        model = HarnessModel(*loaded)
        assert model.chat_template(True) is None
        with pytest.raises(TokenizerError, match="without a chat template"):
            model.apply_chat_template(list(self.HISTORY))

    def test_the_name_of_the_tokenizer_changes_with_the_template(self, model, loaded):
        from mlx_openelm.evaluation.harness import HarnessModel

        assert model.chat_template(True).startswith("{{ bos_token }}")
        assert model.chat_template(False) is None
        assert model.tokenizer_name != HarnessModel(*loaded).tokenizer_name


class TestRun:
    """`evaluate --harness` on made-up tasks."""

    @pytest.fixture(autouse=True)
    def _needs_lm_eval(self, tmp_path_factory, monkeypatch):
        pytest.importorskip("lm_eval")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def words(self, place, *more):
        return ["evaluate", "-m", place / "model", "--harness", "--data", place / "tasks", "-t", NAMES, *more]

    def test_prints_what_it_writes(self, place, tmp_path):
        status, out, err = run(*self.words(place, "--json", "-o", tmp_path / "run", "--limit", 5, "--shots", 1))
        assert status == 0, err
        found = json.loads(out)
        (path,) = (tmp_path / "run" / "lm-eval").glob("*/results_*.json")
        assert json.loads(path.read_text()) == found
        assert found["n-samples"]["made_up_choice"] == {"original": 12, "effective": 5}
        assert found["n-shot"]["made_up_choice"] == 1
        assert found["config"]["fewshot_seed"] == 1234
        assert set(found["results"]["made_up_choice"]) >= {"acc,none", "acc_norm,none", "acc_stderr,none"}
        assert found["results"]["made_up_rolling"]["bits_per_byte,none"] > 0
        samples = sorted(path.name.split("_2")[0] for path in path.parent.glob("samples_*.jsonl"))
        assert samples == ["samples_made_up_choice", "samples_made_up_rolling", "samples_made_up_text"]

    def test_accuracies_are_those_of_the_scores(self, place, loaded):
        results = evaluate_harness(Subject(*loaded, "tiny"), HarnessTasks(["made_up_choice"], place / "tasks"))
        right = 0
        for document in documents(12):
            asked = [Request(f"Question: {document['question']}\nAnswer:", " " + text) for text in document["choices"]]
            best = np.argmax([score.log_likelihood for score in Scorer(*loaded).score(asked)])
            right += best == document["answer"]
        assert results["results"]["made_up_choice"]["acc,none"] == right / 12

    def test_the_same_command_computes_nothing_again(self, place, loaded, tmp_path, monkeypatch):
        from mlx_openelm.evaluation import harness

        subject = Subject(*loaded, "tiny")
        first = evaluate_harness(subject, HarnessTasks([NAMES], place / "tasks"), output=tmp_path / "run")
        monkeypatch.setattr(Scorer, "_compute", lambda *_: pytest.fail("a score was computed again"))
        real = harness.generate_batch
        monkeypatch.setattr(harness, "generate_batch", lambda *a, **k: real(*a, **{**k, "numbers": checked(k)}))

        def checked(settings):
            assert settings["numbers"] == []
            return []

        again = evaluate_harness(
            Subject(*loaded, "tiny"), HarnessTasks([NAMES], place / "tasks"), output=tmp_path / "run"
        )
        assert again["results"] == first["results"]

    def test_a_folder_of_another_model_is_refused(self, place, loaded, tmp_path):
        tasks = HarnessTasks(["made_up_choice"], place / "tasks")
        evaluate_harness(Subject(*loaded, "tiny"), tasks, output=tmp_path / "run")
        other = random_model(CONFIG, seed=1)
        with pytest.raises(EvaluationError, match="is a run of another model: its weights differ"):
            evaluate_harness(Subject(other, loaded[1], "other"), tasks, output=tmp_path / "run")

    def test_prompts_that_are_cut_are_told(self, place, loaded):
        options = HarnessOptions(shots=3, limit=4)
        results = evaluate_harness(Subject(*loaded, "tiny"), HarnessTasks(["made_up_choice"], place / "tasks"), options)
        (note,) = harness_notes(results)
        assert note.endswith("prompts exceed the 128 tokens that the model reads")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ("made_up_choise", "lm-eval has no task 'made_up_choise' in .*; did you mean made_up_choice"),
            ("broken", "lm-eval cannot load broken: "),
            (" , ", "no tasks are named"),
        ],
    )
    def test_tasks_that_are_not_there_are_refused(self, place, names, message):
        with pytest.raises(TaskError, match=message):
            HarnessTasks([names], place / "tasks")

    def test_a_task_file_needs_no_folder(self, place):
        assert list(HarnessTasks([str(place / "tasks" / "choice.yaml")]).loaded["tasks"]) == ["made_up_choice"]

    @pytest.mark.slow
    def test_two_processes_give_what_one_gives(self, place, tmp_path):
        found = []
        for processes in (1, 2):
            out = launched_output(processes, *self.words(place, "--json", "-o", tmp_path / f"{processes}"))
            found.append(json.loads(out))
        one, two = (result["results"] for result in found)
        assert one.keys() == two.keys()
        for name in one:
            assert one[name] == pytest.approx(two[name], abs=1e-6)
        assert {path.name for path in (tmp_path / "2").iterdir()} >= {"scores.jsonl", "scores-1.jsonl", "texts-1.jsonl"}


def launched_output(processes, *words):
    """What a command prints that runs in several processes."""
    command = [*launched(processes), sys.executable, "-m", "mlx_openelm", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lm_eval_is_not_imported_by_other_evaluations(place):
    code = (
        "import sys; from mlx_openelm.evaluation import harness_run, run; from mlx_openelm.commands import evaluate; "
        "print([name for name in ('lm_eval', 'datasets', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
