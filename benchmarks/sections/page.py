"""Results and the pieces of a page: tables, and what ran where."""

import json
from typing import Any

from common import RESULTS


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def where(run: dict[str, Any]) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    name = machine.get("blas", machine.get("preloaded"))  # results name the library in use, older ones LD_PRELOAD
    blas = f", {name}{'' if 'blas' in machine else ' preloaded'}" if name else ""
    return (
        f"{machine['date']}, {machine['device']} of a {machine['system']} machine with {machine['cores']} cores{blas}; "
        f"Python {machine['python']}, {versions}; commit {machine['commit']}.\n\n`{machine['command']}`"
    )


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
