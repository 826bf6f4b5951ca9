"""Runs tasks of lm-eval on a model, and keeps scores, texts and results in the folder of an evaluation."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import EvaluationError, TaskError, one_line, quoted
from ..files.paths import is_folder, user_path
from ..packages import optional_package
from .results import json_number
from .run import Subject, dependencies
from .run_folder import open_run
from .scorer import ScorerConfig
from .text_requests import SEED

_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class HarnessOptions:
    """How tasks of lm-eval are run.

    Attributes:
        shots: solved examples before each question, instead of a task's own number.
        limit: evaluate only the first items of each task.
        chat: whether prompts are put into the chat template.
        scorer: how to score.
    """

    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    scorer: ScorerConfig = field(default_factory=ScorerConfig)


class HarnessTasks:
    """Tasks of lm-eval by name, loaded with their data before a model is.

    Args:
        names: tasks, groups and tags of lm-eval, separated by commas or one by one, or its task files (.yaml).
        folder: a folder with task files, in which names are looked up instead of in lm-eval's own.
    Raises:
        MissingPackageError: if lm-eval is not installed.
        TaskError: if a task is unknown, or cannot be loaded.
    """

    def __init__(self, names: Sequence[str], folder: str | Path | None = None):
        optional_package("lm_eval", "tasks of lm-eval need", "evaluate")
        from lm_eval.tasks import TaskManager

        self.names = [_spec(name.strip()) for text in names for name in text.split(",") if name.strip()]
        if not self.names:
            raise TaskError("no tasks are named")
        if folder is not None and not is_folder(user_path(folder)):
            raise TaskError(f"{folder} is not a folder; expected one with task files of lm-eval (.yaml)")
        is_known = folder is not None or all(name.endswith(_ENDINGS) for name in self.names)
        place = None if folder is None else str(user_path(folder))
        # The index of lm-eval's own tasks takes most of a minute.
        self.manager = TaskManager(include_path=place, include_defaults=not is_known)
        self._check_names(folder)
        self.loaded = self._load()
        self.manager.load = lambda tasks: self.loaded  # `simple_evaluate` would load them once more

    def _check_names(self, folder: str | Path | None) -> None:
        known = [] if folder is None else [f" in {folder}"]
        for name in self.names:
            if name.endswith(_ENDINGS) or name in self.manager.all_tasks:
                continue
            close = get_close_matches(name, self.manager.all_tasks, 3, 0.6)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise TaskError(f"lm-eval has no task {quoted(name)}{''.join(known)}{hint}")

    def _load(self) -> Any:
        try:
            with redirect_stdout(sys.stderr):
                loaded = self.manager.load(self.names)
        except Exception as error:  # of any kind: task files hold Python, and data are downloaded
            raise TaskError(f"lm-eval cannot load {', '.join(self.names)}: {one_line(error)}") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise TaskError(f"{name} runs code that the model writes, which this program does not do")
            if getattr(task, "MULTIMODAL", False):
                raise TaskError(f"{name} shows pictures or sounds to the model, which reads text alone")
        return loaded


def evaluate_harness(
    subject: Subject,
    tasks: HarnessTasks,
    options: HarnessOptions = HarnessOptions(),
    *,
    output: str | Path | None = None,
    group: mx.distributed.Group | None = None,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` says of a model, without the samples.

    Args:
        output: a folder for scores, texts and results. Those that it holds are not computed again, so that a run that
            was interrupted continues; lm-eval's files are in its folder `lm-eval`.
        group: processes that share the work.

    Raises:
        OpenELMError: a subclass, if `output` belongs to another model, or a request cannot be answered.
    """
    from lm_eval import simple_evaluate

    from .harness import HarnessModel

    if options.chat and not subject.tokenizer.has_chat_template:
        raise EvaluationError("`chat` requires a chat template, which the model does not have")
    start = time.perf_counter()
    with open_run(output, 0 if group is None else group.rank()) as folder:
        about = {} if folder is None else dependencies(subject, options.scorer)
        harness_model = HarnessModel(
            subject.model,
            subject.tokenizer,
            options.scorer,
            scores=None if folder is None else folder.scores(about),
            texts=None if folder is None else folder.texts(about),
            group=group,
        )
        adapter = {} if subject.adapter is None else {"peft": subject.adapter}
        with redirect_stdout(sys.stderr):  # tasks may print, and stdout is for results
            results: dict[str, Any] = simple_evaluate(
                model=harness_model,
                model_args={"pretrained": subject.name, **adapter},
                tasks=tasks.names,
                task_manager=tasks.manager,
                num_fewshot=options.shots,
                limit=options.limit,
                apply_chat_template=options.chat,
                fewshot_random_seed=SEED,
            )
        samples = results.pop("samples")
        results = _completed(results, harness_model, samples, subject.name, options)
        results["total_evaluation_time_seconds"] = str(time.perf_counter() - start)
        if folder is not None:
            lines = {label: map(_sample_line, found) for label, found in samples.items()}
            folder.write_theirs(subject.name, harness_json(results), lines)
    return results


def harness_table(results: Mapping[str, Any]) -> str:
    """lm-eval's tables of tasks and groups, in Markdown."""
    from lm_eval.utils import make_table

    parts = [make_table(results), *([make_table(results, "groups")] if results.get("groups") else [])]
    return "\n".join(part.rstrip() + "\n" for part in parts).rstrip()


def harness_json(results: Mapping[str, Any]) -> str:
    """Results as lm-eval writes them; numbers that are not finite are null."""
    return json.dumps(_plain(results), indent=2, ensure_ascii=False) + "\n"


def harness_notes(results: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the figures has to know: prompts that were cut off, and scores that are not numbers."""
    config = results["config"]
    if config["num_truncated"]:
        yield f"{config['num_truncated']:,} prompts exceed the {config['max_length']:,} tokens that the model reads"
    if config["num_not_finite"]:
        yield f"{config['num_not_finite']:,} log-likelihoods are not finite: do not trust the figures"


def _spec(name: str) -> str:
    """A name, or the whole path of a task file."""
    return str(user_path(name).absolute()) if name.endswith(_ENDINGS) else name


def _completed(
    results: dict[str, Any], model: Any, samples: Mapping[str, Any], name: str, options: HarnessOptions
) -> dict[str, Any]:
    """The results with what lm-eval's own command adds to them."""
    from lm_eval.utils import hash_string, sanitize_model_name

    template = model.chat_template(options.chat)
    hashes = {
        label: hash_string("".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in of))
        for label, of in samples.items()
    }
    results["config"]["model"] = "openelm-mlx"
    return {
        **results,
        "eot_token_id": model.eot_token_id,
        "max_length": model.max_length,
        "task_hashes": hashes,
        "model_source": "openelm-mlx",
        "model_name": name,
        "model_name_sanitized": sanitize_model_name(name),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": True,
        "chat_template": template,
        "chat_template_sha": hash_string(template) if template else None,
    }


def _sample_line(sample: Mapping[str, Any]) -> str:
    """A line of JSON, in the shape of lm-eval's files of samples."""
    from lm_eval.utils import sanitize_list

    arguments = {
        f"gen_args_{number}": {f"arg_{place}": value for place, value in enumerate(given)}
        for number, given in enumerate(sample["arguments"])
    }
    changed = {
        "arguments": arguments,
        "target": str(sample["target"]),
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
    }
    return json.dumps(_plain({**sample, **changed}), ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    from lm_eval.utils import handle_non_serializable

    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return json_number(value)
    return value if value is None or isinstance(value, (str, int, bool)) else _plain(handle_non_serializable(value))
