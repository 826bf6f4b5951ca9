"""Distributed runs: joining the process group."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, OpenELMError
from ..files.json_file import parse_json
from ..files.paths import read_text
from .streams import clean

if TYPE_CHECKING:
    from collections.abc import Iterator

    import mlx.core as mx

_PATIENCE_SECONDS = 60
# A separate process, because MLX blocks every thread of this one while it waits.
_WATCH = """
import os, sys, time
parent, seconds, message = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
end = time.monotonic() + seconds
while time.monotonic() < end and os.getppid() == parent:
    time.sleep(min(1, seconds))
if os.getppid() == parent:
    print(message, file=sys.stderr, flush=True)
"""


def join_processes(patience_seconds: float = _PATIENCE_SECONDS) -> mx.distributed.Group:
    """Join the group of processes started by `mlx.launch`; prints one message if the others take long."""
    import mlx.core as mx

    with _watched(patience_seconds):
        return mx.distributed.init()


@contextmanager
def _watched(patience_seconds: float) -> Iterator[None]:
    if not (hosts := _hosts()):
        yield
        return
    message = (
        f"openelm-mlx: process {os.environ.get('MLX_RANK', '?')} has been waiting {patience_seconds:g} seconds "
        f"for the other processes; expected at {', '.join(hosts)}"
    )
    words = [sys.executable, "-c", _WATCH, str(os.getpid()), str(patience_seconds), clean(message)]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as watch:
        try:
            yield
        finally:
            watch.kill()


def _hosts() -> list[str]:
    """Addresses of all processes, from the host file that MLX reads."""
    try:
        path = Path(os.environ["MLX_HOSTFILE"])
        ranks = parse_json(read_text(path, ConfigError), str(path), ConfigError)
        return [", ".join(map(str, addresses)) for addresses in ranks]
    except (KeyError, TypeError, OpenELMError):
        return []
