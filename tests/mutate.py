"""Mutation testing: changes the code in small ways, and counts the changes that a test notices.

    pip install cosmic-ray
    python tests/mutate.py --count 600 --seed 0 --output mutants.json

Mutants are drawn with a fixed seed from the modules below, outside type annotations. For each, the tests of its module
run in a fresh process on a copy of the project, and stop at the first failure. A timeout counts as killed. `--again
mutants.json` runs the tests of today on those that survived, and keeps the other results.
"""

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).parent.parent
TESTS = {
    "generation/sampling.py": ["test_sampling.py"],
    "generation/stop.py": ["test_stop.py"],
    "data/formats.py": ["test_formats.py"],
    "data/example_batches.py": ["test_example_batches.py"],
    "config.py": ["test_config.py"],
    "training/loss.py": ["test_loss.py"],
    "training/dpo.py": ["test_dpo.py"],
    "cache/layouts.py": ["test_layouts.py"],
}
_ALIASES = ("State", "Buffers", "Messages")  # of types
_TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Mutant:
    """One change: the `occurrence`-th place where an operator applies in a module."""

    module: str
    operator: str
    occurrence: int
    line: int


def all_mutants() -> list[Mutant]:
    """Every change that could be made."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    names = [name for name in sorted(cosmic_ray.plugins.operator_names()) if "variable" not in name.lower()]
    mutants = []
    for module in TESTS:
        source = (ROOT / "mlx_openelm" / module).read_text(encoding="utf-8")
        skipped = _annotations(source)
        tree = get_ast(source)
        for name in names:
            operator = cosmic_ray.plugins.get_operator(name)()
            positions = [position for node in ast_nodes(tree) for position in operator.mutation_positions(node)]
            for occurrence, ((line, column), _) in enumerate(positions):
                if not any(begin <= (line, column) < end for begin, end in skipped):
                    mutants.append(Mutant(module, name, occurrence, line))
    return mutants


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where type annotations begin and end."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            if (part := getattr(node, name, None)) is not None:
                found.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in _ALIASES:
            found.append(((node.lineno, 0), (node.end_lineno, node.end_col_offset)))
    return found


def applied(mutant: Mutant, original: str) -> tuple[str, str]:
    """The changed source of its module, and the change as a diff."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    changed = mutate_code(original, cosmic_ray.plugins.get_operator(mutant.operator)(), mutant.occurrence)
    diff = difflib.unified_diff(original.splitlines(), changed.splitlines(), lineterm="", n=0)
    return changed, "\n".join(line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def same_today(survivors: list[dict[str, Any]]) -> list[Mutant]:
    """The mutants that make the same changes as those of an earlier run, wherever they are in their modules now."""
    possible = all_mutants()
    found = []
    for survivor in survivors:
        original = (ROOT / "mlx_openelm" / survivor["module"]).read_text(encoding="utf-8")
        kind = [m for m in possible if (m.module, m.operator) == (survivor["module"], survivor["operator"])]
        found += [mutant for mutant in kind if applied(mutant, original)[1] == survivor["diff"]][:1]
    return found


def passes(module: str, folder: Path) -> bool:
    """Whether the tests of a module pass in a copy of the project."""
    tests = [str(folder / "tests" / name) for name in TESTS[module]]
    command = [ARGUMENTS.python.absolute(), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=_TIMEOUT_SECONDS)
    return done.returncode == 0


def outcome_of(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """ "killed", "timeout" or "survived", and the change as a diff."""
    path = folder / "mlx_openelm" / mutant.module
    original = path.read_text(encoding="utf-8")
    changed, shown = applied(mutant, original)
    path.write_text(changed, encoding="utf-8")
    try:
        return ("survived" if passes(mutant.module, folder) else "killed"), shown
    except subprocess.TimeoutExpired:
        return "timeout", shown
    finally:
        path.write_text(original, encoding="utf-8")


def main() -> None:
    """Draw mutants, run the tests on each, and write what happened."""
    drawn = all_mutants()
    total = len(drawn)
    if ARGUMENTS.only:
        drawn = [mutant for mutant in drawn if mutant.module in ARGUMENTS.only]
    drawn = random.Random(ARGUMENTS.seed).sample(drawn, min(ARGUMENTS.count, len(drawn)))
    num_mutants = len(drawn)
    folders: Queue[Path] = Queue()
    results: list[dict[str, Any]] = []
    if ARGUMENTS.again:
        earlier = json.loads(ARGUMENTS.again.read_text(encoding="utf-8"))["mutants"]
        drawn = same_today([entry for entry in earlier if entry["outcome"] == "survived"])
        changes = {
            applied(mutant, (ROOT / "mlx_openelm" / mutant.module).read_text(encoding="utf-8"))[1] for mutant in drawn
        }
        results = [entry for entry in earlier if entry["outcome"] != "survived" or entry["diff"] not in changes]
        num_mutants = len(results) + len(drawn)
    started = time.time()
    with tempfile.TemporaryDirectory() as place:
        for worker in range(ARGUMENTS.workers):
            folder = Path(place) / str(worker)
            for name in ("mlx_openelm", "tests"):
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
            folders.put(folder)

        for module in {mutant.module for mutant in drawn}:
            assert passes(module, Path(place) / "0"), f"the tests of {module} fail without a change"

        def run(mutant: Mutant) -> dict[str, Any]:
            folder = folders.get()
            try:
                outcome, diff = outcome_of(mutant, folder)
            finally:
                folders.put(folder)
            return {**asdict(mutant), "outcome": outcome, "diff": diff}

        with ThreadPoolExecutor(ARGUMENTS.workers) as pool:
            for result in pool.map(run, drawn):
                results.append(result)
                if len(results) % 20 == 0:
                    counts = Counter(entry["outcome"] for entry in results)
                    print(f"{len(results)} of {num_mutants}: {dict(counts)}, {time.time() - started:.0f} s", flush=True)
                ARGUMENTS.output.write_text(
                    json.dumps({"seed": ARGUMENTS.seed, "possible": total, "mutants": results}, indent=1) + "\n"
                )
    for module in TESTS:
        counts = Counter(entry["outcome"] for entry in results if entry["module"] == module)
        print(f"{module}: {dict(counts)}")
    alive = sum(entry["outcome"] == "survived" for entry in results)
    print(f"{len(results)} of {total} mutants: {1 - alive / len(results):.1%} killed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", type=Path, help="result of an earlier run")
    parser.add_argument("--only", nargs="*", help="modules to draw from")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter that runs the tests")
    parser.add_argument("--output", type=Path, default=Path("mutants.json"))
    ARGUMENTS = parser.parse_args()
    main()
