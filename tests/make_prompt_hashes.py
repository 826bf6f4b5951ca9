"""Makes `golden/evaluation/*.json`: hashes of the prompts that lm-eval builds from made-up data.

    python tests/make_prompt_hashes.py FOLDER > tests/golden/evaluation/lm_eval_VERSION.json

FOLDER is an unpacked wheel of lm-eval, which holds `lm_eval/`; its requirements are installed, without torch. Its own
task files and task code are used; only the data sets are replaced, by those of `made_up_tasks.py`.
"""

import hashlib
import json
import logging
import sys
import types
from functools import cache
from pathlib import Path
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).parent))
from made_up_tasks import CASES, made_up

FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "winogrande": "winogrande/default.yaml",
    "race": "race/race.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "crows_pairs_english": "crows_pairs/crows_pairs_english.yaml",
}


def load_yaml(path):
    """A task's configuration, with what it includes and with its functions."""
    try:
        from lm_eval.tasks._yaml_loader import load_yaml as load

        return load(path)
    except ImportError:
        from lm_eval.utils import load_yaml_config

        return load_yaml_config(yaml_path=str(path), mode="full")


@cache
def task_class():
    """lm-eval's class of tasks, imported with stand-ins for what its models and metrics need."""
    import datasets  # noqa: F401
    import evaluate  # both before the stand-ins, because they look for these packages

    evaluate.load = MagicMock()  # metrics that would be downloaded
    missing = [name for name in ("torch", "torch.nn", "torch.nn.functional", "transformers") if name not in sys.modules]
    sys.modules.update({name: MagicMock() for name in missing})
    from lm_eval.api.task import ConfigurableTask

    for name in missing:
        del sys.modules[name]
    return ConfigurableTask


def build(folder, name, shots):
    """The task and its requests for all documents."""
    import datasets

    splits = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in made_up(name).items()})
    datasets.load_dataset = lambda *args, **options: splits
    file = FILES.get(name) or f"mmlu/default/{name}.yaml"
    config = load_yaml(folder / "lm_eval" / "tasks" / file)
    config = {key: value for key, value in config.items() if key != "class"}
    task = task_class()(config=config)
    if name != "truthfulqa_mc2":  # its number of examples is fixed in its file
        task.set_config(key="num_fewshot", value=shots)
    if hasattr(task, "set_fewshot_seed"):
        task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return task


def hashes(task):
    """One hash for each document: its requests, choices and right answer."""
    found = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(list(instance.args))
    result = []
    for number, document in enumerate(task.eval_docs):
        gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        content = [found[number], list(task.doc_to_choice(document)), gold]
        result.append(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12])
    return " ".join(result)


def main():
    logging.disable(logging.WARNING)
    folder = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(folder))
    package = types.ModuleType("lm_eval")  # without its __init__, which may import torch
    package.__path__ = [str(folder / "lm_eval")]
    sys.modules["lm_eval"] = package
    (version,) = (path.name.split("-")[1].removesuffix(".dist") for path in folder.glob("lm_eval-*.dist-info"))
    result = {"lm_eval": version, "versions": {}, "hashes": {}}
    for name, shots in CASES:
        task = build(folder, name, shots)
        result["versions"][name] = str(task.VERSION)
        result["hashes"][f"{name} {shots}"] = hashes(task)
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
