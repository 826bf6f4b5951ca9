"""What the documents say is what the program does. Run as a script, this writes `docs/commands.md` anew."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import mlx_openelm
from conftest import SMALL_CONFIG, random_model, write_folder
from mlx_openelm.commands.app import all_commands, as_flags
from mlx_openelm.hub import BUILT_IN_MODELS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = all_commands()


def commands_document():
    """Every command with its options, as a table."""
    lines = ["# Commands", "", "Made from the program itself; `openelm-mlx COMMAND --help` says the same."]
    lines += ["", "Every command has these options too:", "", "| option | |", "|---|---|"]
    common = [option for option in COMMANDS["info"].params if option.name in ("verbose", "quiet")]
    lines += [f"| {', '.join(f'`{text}`' for text in option.opts)} | {option.help} |" for option in common]
    for name, command in COMMANDS.items():
        lines += ["", f"## {name}", "", command.help, "", "| option | | default |", "|---|---|---|"]
        for option in command.params:
            if option.name in ("verbose", "quiet"):
                continue
            names = ", ".join(f"`{text}`" for text in [*option.opts, *option.secondary_opts])
            default = "" if option.default in (None, False) or option.required else f"`{option.default}`"
            lines.append(f"| {names} | {getattr(option, 'help', None) or ''} | {default} |")
        examples = (command.epilog or "").split("\n\n")[1:]
        if examples:
            lines += ["", "```sh", *examples, "```"]
    return "\n".join(lines) + "\n"


def test_commands_document_is_up_to_date():
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == commands_document()


def blocks(language):
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [
        (str(path.relative_to(ROOT)), block)
        for path in DOCUMENTS
        for block in pattern.findall(path.read_text(encoding="utf-8"))
    ]


def typed_lines():
    lines = {line for _, block in blocks("sh") for line in block.splitlines() if line.startswith("openelm-mlx ")}
    return sorted(lines)


@pytest.mark.parametrize("line", typed_lines())
def test_commands_in_documents_can_be_typed(line):
    _, name, *arguments = shlex.split(re.split(r"\s[<>]\s", line)[0], comments=True)
    COMMANDS[name].make_context(name, arguments, resilient_parsing=False)


def python_of(document):
    """All Python of a document, as one program."""
    return "\n".join(block for name, block in blocks("python") if name == document)


DOCUMENTS_WITH_PYTHON = sorted({name for name, _ in blocks("python")})


def test_python_in_documents_type_checks(tmp_path):
    paths = []
    for document in DOCUMENTS_WITH_PYTHON:
        paths.append(tmp_path / f"{re.sub(r'[^a-z]', '_', document.lower())}.py")
        paths[-1].write_text(python_of(document), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "mypy", *paths], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("document", DOCUMENTS_WITH_PYTHON)
def test_python_in_documents_runs(document, tmp_path, chat_tokenizer):
    """On a small random model in a folder of the name that the document says."""
    program = python_of(document)
    for name in {*re.findall(r'"(OpenELM-[\w.]+(?:-Instruct)?)"', program), *BUILT_IN_MODELS}:
        write_folder(tmp_path / name, random_model(replace(SMALL_CONFIG, max_context_length=512)), chat_tokenizer)
    records = [{"prompt": f"{number} and", "completion": f" {number + 1}."} for number in range(20)]
    for name in ("answers", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = re.sub(r"\[\[1, 9038, 2501\]\]", "[[1, 38, 251]]", program)
    program = program.replace("steps=100", "steps=2").replace("steps=10)", "steps=2)").replace("steps=10,", "steps=2,")
    program = program.replace("rank=16,", "rank=2, steps=2,")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_reference_lists_every_public_name():
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: mlx_openelm\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(set(mlx_openelm.__all__) - {"__version__"})


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    found = set()
    todo = [navigation]
    while todo:
        entry = todo.pop()
        if isinstance(entry, str):
            found.add(entry)
        else:
            todo += entry.values() if isinstance(entry, dict) else entry
    expected = {path.relative_to(ROOT / "docs").as_posix() for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")}
    assert expected <= found


def test_links_between_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


class TestWorkflow:
    """The workflow of the hosted runners, which nothing here runs."""

    JOBS = workflow("tests.yml")["jobs"]

    def lines(self):
        """Every line that a step runs, without the variables before it."""
        steps = [step for job in self.JOBS.values() for step in job["steps"]]
        lines = [line for step in steps for line in step.get("run", "").splitlines()]
        return [re.sub(r'^(\w+="[^"]*" )+', "", line) for line in lines]

    def test_every_job_ends_at_some_time_and_starts_with_the_code(self):
        for job in self.JOBS.values():
            assert 0 < job["timeout-minutes"] <= 90
            assert [step["uses"].partition("@")[0] for step in job["steps"][:2]] == [
                "actions/checkout",
                "actions/setup-python",
            ]

    def test_apple_silicon_and_both_architectures_of_linux_are_covered(self):
        systems = {job["runs-on"] for job in self.JOBS.values()}
        systems |= {
            entry["os"]
            for job in self.JOBS.values()
            for entry in job.get("strategy", {}).get("matrix", {}).get("include", [])
        }
        assert {"macos-15", "ubuntu-24.04", "ubuntu-24.04-arm"} <= systems

    def test_targets_and_commands_exist(self):
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        made = {line.removeprefix("make ") for line in self.lines() if line.startswith("make ")}
        assert {"check", "demo"} <= made <= set(targets)
        typed = [line.split() for line in self.lines() if "openelm-mlx" in line]
        assert typed
        for program, name, *_ in typed:
            assert program == ".venv/bin/openelm-mlx"
            assert name in COMMANDS

    def test_what_the_self_test_writes_is_kept(self):
        steps = self.JOBS["macos"]["steps"]
        written = [shlex.split(step["run"])[-1] for step in steps if "--self-test" in step.get("run", "")]
        kept = [step["with"]["path"] for step in steps if step.get("uses", "").startswith("actions/upload-artifact@")]
        assert written == kept != []


def library_strings():
    """Every text in the code outside the command line that is no docstring, with its place."""
    package = ROOT / "mlx_openelm"
    for path in sorted(package.rglob("*.py")):
        name = str(path.relative_to(package))
        if name in ("cli.py", "llm_plugin.py") or name.startswith("commands/"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, documented) and ast.get_docstring(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield f"{name}:{node.lineno}", node.value


def test_the_library_names_parameters_and_no_flags():
    """But for the command in a model card, and those of other programs."""
    allowed = "conversion/convert.py", "conversion/write/model_card.py", "machine/hardware.py", "packages.py"
    flags = [(place, text) for place, text in library_strings() if re.search(r"(?<![\w-])--[a-z]", text)]
    assert [found for found in flags if not found[0].startswith(allowed)] == []


def test_parameters_in_messages_are_flags_on_the_command_line():
    assert as_flags("x exists; use `force`, or another `output`") == "x exists; use --force, or another --output"
    assert as_flags("use `dtype=bfloat16` or `tokenizer=none`") == "use --dtype bfloat16 or --tokenizer none"
    assert as_flags("try a lower `learning_rate`") == "try a lower --learning-rate"
    assert (
        as_flags("`window` and `bits`; `chat=False` turns it off") == "--max-kv-size and --kv-bits; --raw turns it off"
    )
    assert as_flags("`convert` takes files; see `some_name`") == "`convert` takes files; see `some_name`"


def functions_above(limit, path):
    """Functions with more lines of code than this, without their signature and docstring."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            first = function.body[1:2] if ast.get_docstring(function) else function.body[:1]
            if first and function.end_lineno - first[0].lineno >= limit:
                yield function.name


def test_the_tree_in_the_design_is_complete_and_gives_a_reason_for_what_is_long():
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([a-z_/]+\.py)` \| (.+) \|$", design, re.MULTILINE))
    package = ROOT / "mlx_openelm"
    files = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    assert listed.keys() == {name for name in files if name == "__init__.py" or not name.endswith("/__init__.py")}
    for name, what in listed.items():
        lines = files[name].read_text(encoding="utf-8").count("\n")
        assert lines <= 350 or "long" in what, f"{name} has {lines} lines"
        for function in functions_above(60, files[name]):
            assert f"`{function}()`" in what, f"{function} in {name} is long; say why in docs/design.md"


TESTED_ELSEWHERE = {  # modules whose tests are in a file of another name
    "test_hub.py": ["hub_client.py"],
    "test_chat_template.py": ["tokenizer/sandbox.py"],
    "test_cli.py": ["cli.py", "__main__.py", "errors.py", "version.py", "packages.py", "commands/"],
    "test_bench.py": ["benchmark/measure.py", "benchmark/models.py", "benchmark/report.py", "machine/hardware.py"],
    "test_convert.py": ["conversion/average.py", "conversion/open.py", "conversion/source.py", "conversion/write/"],
    "test_conversion_adapters.py": ["conversion/adapters/"],
    "test_read_config.py": ["conversion/read/config.py"],
    "test_loading.py": ["conversion/read/huggingface.py", "conversion/read/corenet.py", "conversion/describe.py"],
    "test_tensors.py": ["file_values.py"],
    "test_torch_file.py": ["conversion/read/torch_pickle.py"],
    "test_cache_config.py": ["cache/config.py"],
    "test_corpus.py": ["data/train_tokenizer.py"],
    "test_data_batch.py": ["data/batch.py"],
    "test_generation_batch.py": ["generation/batch.py"],
    "test_files.py": ["files/lock.py", "files/manifest.py", "files/names.py", "files/output.py", "files/rename.py"],
    "test_settings_files.py": ["files/fields.py", "files/json_file.py", "files/yaml_file.py"],
    "test_prompts.py": ["evaluation/items.py", "evaluation/questions.py", "evaluation/requests.py"],
    "test_task.py": ["evaluation/suites.py"],
    "test_task_data.py": ["evaluation/task_locks.py"],
    "test_text_files.py": ["data/limits.py"],
    "test_openelm.py": ["model/forward_context.py", "model/rope.py"],
    "test_run.py": ["evaluation/run_folder.py"],
    "test_scorer.py": ["evaluation/items.py", "evaluation/requests.py"],
    "test_cpu.py": ["kernels/cpu.py"],
    "test_fused.py": ["kernels/dialects.py", "kernels/fused.py", "kernels/sources.py", "model/fused_attention.py"],
    "test_engine.py": ["generation/decode_step.py"],
    "test_lora.py": ["merging.py", "evaluation/divergence.py"],
    "test_tokenizer_files.py": ["tokenizer/files.py", "tokenizer/settings.py"],
    "test_tokenizer.py": ["tokenizer/libraries.py"],
    "test_package.py": ["__init__.py", "training/run.py"],
    "test_pretrain.py": ["training/loop.py", "training/resume.py"],
    "test_metrics.py": ["evaluation/items.py", "evaluation/requests.py"],
    "test_plot.py": ["evaluation/picture.py"],
    "test_report.py": ["evaluation/table.py"],
    "test_tune.py": ["training/tune_recipe.py"],
    "test_recipe_options.py": ["training/setting.py"],
    "test_memory.py": ["machine/device.py", "machine/system.py"],
    "test_self_test.py": ["self_test/check.py", "self_test/report.py", "self_test/runner.py"],
    "test_self_test_checks.py": ["self_test/"],
    "test_harness.py": ["evaluation/harness_run", "evaluation/text_requests"],
}


def test_every_module_has_a_test_file():
    tests = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert set(TESTED_ELSEWHERE) <= tests
    elsewhere = tuple(name for names in TESTED_ELSEWHERE.values() for name in names)
    package = ROOT / "mlx_openelm"
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        if path.name != "__init__.py" and not name.startswith(elsewhere):
            assert f"test_{path.stem}.py" in tests, name


def test_every_public_name_is_documented():
    for name in mlx_openelm.__all__:
        thing = getattr(mlx_openelm, name)
        if name.startswith("__") or isinstance(thing, dict):
            continue
        assert thing.__doc__, name


if __name__ == "__main__":
    (ROOT / "docs" / "commands.md").write_text(commands_document(), encoding="utf-8")
