"""Results in the shape of lm-eval's files, version 0.4.13, for tools that read those.

    MODEL/results_DATE.json
    MODEL/samples_TASK_DATE.jsonl

DATE has no underscore, because lm-eval finds the task's name between the first and the last one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import PurePath
from typing import Any

from .items import ItemResult
from .metrics import ROUNDED
from .report import EvaluationReport
from .results import GroupResult, MetricValue, TaskResult, json_number

SHAPE_VERSION = "0.4.13"
_FILTER = "none"
_THEIR_NAMES = {"mc2": "acc"}  # of metrics
_LOWER_IS_BETTER = frozenset({"pct_stereotype", "likelihood_diff"})


def lm_eval_names(report: EvaluationReport, time: datetime) -> dict[str, str]:
    """Names of the files: of the samples by the label of their task, and of the results by an empty label."""
    return result_names(report.model, report.by_label(), time)


def result_names(model: str, labels: Iterable[str], time: datetime) -> dict[str, str]:
    """The same for any model and labels."""
    folder, date = _safe(model), time.replace(tzinfo=None).isoformat().replace(":", "-")
    samples = {label: f"{folder}/samples_{_safe(label)}_{date}.jsonl" for label in labels}
    return {"": f"{folder}/results_{date}.json", **samples}


def lm_eval_results(report: EvaluationReport, time: datetime, seconds: float | None = None) -> dict[str, Any]:
    """What lm-eval writes into its file of results, with the same keys where this package knows their values.

    Args:
        time: when the evaluation started.
        seconds: how long it took.
    """
    tasks, groups = report.by_label(), report.groups_by_label()
    everything: dict[str, TaskResult] = {**tasks, **groups}
    values = {
        "results": {label: _metrics(label, result) for label, result in everything.items()},
        "groups": {label: _metrics(label, group) for label, group in groups.items()},
        "group_subtasks": {label: list(group.members) for label, group in groups.items()},
        "configs": {label: _config(result) for label, result in tasks.items()},
        "versions": {label: _version(result.version) for label, result in everything.items()},
        "n-shot": {label: result.shots for label, result in everything.items()},
        "higher_is_better": {label: _directions(result) for label, result in everything.items()},
        "n-samples": {label: _sizes(result) for label, result in tasks.items()},
        "config": {
            "model": "openelm-mlx",
            "model_args": f"pretrained={report.model}" + (f",peft={report.adapter}" if report.adapter else ""),
            "model_dtype": report.dtype,
            "limit": report.limit,
            "protocol": report.protocol,
            **report.settings,
        },
        "git_hash": report.machine.get("commit"),
        "date": time.timestamp(),
        "pretty_env_info": json.dumps(dict(report.machine)),
        "lm_eval_version": f"none; written by openelm-mlx in the shape of {SHAPE_VERSION}",
        "task_hashes": {label: result.prompt_hash for label, result in tasks.items()},
        "model_source": "openelm-mlx",
        "model_name": report.model,
        "model_name_sanitized": _safe(report.model),
        "system_instruction": None,
        "chat_template": None,
    }
    if not groups:
        del values["groups"]
    return values if seconds is None else {**values, "total_evaluation_time_seconds": str(seconds)}


def lm_eval_samples(items: Iterable[ItemResult]) -> Iterator[str]:
    """A line of JSON for each item, as in lm-eval's files of samples.

    `doc` has the choices and the gold positions, not the whole record of the data.
    """
    for result in items:
        item = result.item
        doc = {"choices": list(item.choices), "gold": list(item.gold)}
        target = str(item.gold[0]) if len(item.gold) == 1 else str(list(item.gold))
        responses = [[str(score.log_likelihood), str(score.is_greedy)] for score in result.scores]
        metrics = {_their_name(name): json_number(value) for name, value in result.metrics.items()}
        sample = {
            "doc_id": item.index,
            "doc": doc,
            "target": target,
            "arguments": {
                f"gen_args_{number}": {"arg_0": request.context, "arg_1": request.continuation}
                for number, request in enumerate(item.requests)
            },
            "resps": [[response] for response in responses],
            "filtered_resps": responses,
            "filter": _FILTER,
            "metrics": list(metrics),
            "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
            "prompt_hash": _hash(item.requests[0].context),
            "target_hash": _hash(target),
            **metrics,
        }
        yield json.dumps(sample) + "\n"


def _metrics(label: str, result: TaskResult) -> dict[str, Any]:
    values: dict[str, Any] = {"name": label, "alias": label, "sample_len": result.num_items}
    for name, value in result.metrics.items():
        theirs = _their_name(name)
        values[f"{theirs},{_FILTER}"] = json_number(value.value)
        values[f"{theirs}_stderr,{_FILTER}"] = _error(value)
    if isinstance(result, GroupResult):
        values["sample_count"] = {f"{_their_name(name)},{_FILTER}": result.num_items for name in result.metrics}
    return values


def _config(result: TaskResult) -> dict[str, Any]:
    return {
        "task": result.task,
        "num_fewshot": result.shots,
        "output_type": "multiple_choice",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": is_better}
            for name, is_better in _directions(result).items()
        ],
        "metadata": {"version": _version(result.version), "protocol": result.protocol, "data": dict(result.data)},
    }


def _directions(result: TaskResult) -> dict[str, bool]:
    names = dict.fromkeys(map(_their_name, result.metrics))
    return {name: name.removesuffix(ROUNDED) not in _LOWER_IS_BETTER for name in names}


def _sizes(result: TaskResult) -> dict[str, int]:
    return {"original": result.num_available, "effective": result.num_items}


def _their_name(metric: str) -> str:
    kind = metric.removesuffix(ROUNDED)
    return _THEIR_NAMES.get(kind, kind) + metric[len(kind) :]


def _version(version: str | None) -> float | str | None:
    try:
        return None if version is None else float(version)
    except ValueError:
        return version


def _error(value: MetricValue) -> float | str:
    return "N/A" if json_number(value.stderr) is None else float(value.stderr or 0)


def _safe(name: str) -> str:
    """A name for a file; lm-eval replaces the same characters."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", str(PurePath(name)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
