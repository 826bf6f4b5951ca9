"""The report of a self-test: all outcomes, and the machine without anything that tells whose it is."""

import getpass
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..machine.device import choices
from ..machine.doctor import Diagnosis
from ..machine.hardware import describe
from .check import FAILED, Outcome

FORMAT = 1  # of the JSON; higher if a field changes its meaning
_VARIABLES = ("OPENELM_MLX_CHOICES", "MLX_ENABLE_TF32", "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
_HARMLESS = re.compile(r"[\w=,. -]{0,100}")
_FOLDERS = re.compile(r"(?<![\w/~])~?/(?:[^/'\":\n]*/)*")  # names may contain spaces: rather too much than too little
_KEPT = ("chip", "device", "system", "cores", "python", "commit", "date")


@dataclass(frozen=True)
class Row:
    """A check that is done."""

    name: str
    outcome: Outcome
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"check": self.name, "seconds": round(self.seconds, 3), **asdict(self.outcome)}


@dataclass(frozen=True)
class Report:
    """What a self-test has found so far."""

    rows: tuple[Row, ...]
    machine: dict[str, Any]
    running: str | None = None  # name of the check that runs now; where it ends the process, the file tells which
    is_interrupted: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all checks are done."""
        return self.running is None

    @property
    def counts(self) -> dict[str, int]:
        """Number of checks by status."""
        return dict(Counter(row.outcome.status for row in self.rows))

    @property
    def has_failed(self) -> bool:
        """Whether a check failed."""
        return FAILED in self.counts

    @property
    def advice(self) -> list[str]:
        """What the user can do, without repetition."""
        return list(dict.fromkeys(row.outcome.advice for row in self.rows if row.outcome.advice))

    def to_dict(self) -> dict[str, Any]:
        """All rows and the machine, for JSON."""
        return {
            "self_test": FORMAT,
            "is_complete": self.is_complete,
            "running": self.running,
            "seconds": round(sum(row.seconds for row in self.rows), 1),
            "counts": self.counts,
            "machine": self.machine,
            "checks": [row.to_dict() for row in self.rows],
        }

    def to_json(self) -> str:
        """The report as JSON text, without personal data."""
        return json.dumps(_anonymous_values(self.to_dict()), indent=2) + "\n"


def about_machine(diagnosis: Diagnosis) -> dict[str, Any]:
    """Versions, chip, device and memory: no names of hosts or users, no paths, no serial numbers."""
    described = describe("")
    return {
        **{name: described[name] for name in _KEPT},
        "versions": diagnosis.versions,
        "memory_bytes": diagnosis.memory_bytes,
        "memory_limit_bytes": diagnosis.memory_limit_bytes,
        "wired_limit_bytes": diagnosis.wired_limit_bytes,
        "float32_matmul_gflops": diagnosis.float32_matmul_gflops,
        "blas": Path(diagnosis.blas).name if diagnosis.blas else None,
        "choices": asdict(choices()),
        "environment": {
            name: value for name in _VARIABLES if _HARMLESS.fullmatch(value := os.environ.get(name, "")) and value
        },
    }


def anonymous(text: str, names: Sequence[str] | None = None) -> str:
    """A message without folders, and without the names of the user and the host."""
    for name in _own_names() if names is None else names:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "***", text)
    return _FOLDERS.sub("", text)


def _own_names() -> list[str]:
    names = {platform.node(), platform.node().partition(".")[0], Path.home().name if os.environ.get("HOME") else ""}
    with suppress(Exception):  # a user without a name
        names.add(getpass.getuser())
    return sorted(filter(None, names), key=len, reverse=True)


def _anonymous_values(value: Any) -> Any:
    """The same value with every text of a check made anonymous."""
    if isinstance(value, dict):
        return {key: one if key == "machine" else _anonymous_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_anonymous_values(one) for one in value]
    return anonymous(value) if isinstance(value, str) else value
