"""The entry of the command line: Ctrl-C from the first import on, and the exit status (`commands/app.py` has the rest).

Nothing but `interrupts` is imported at the top, so that Ctrl-C during the other imports is one line.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # run as a script, by its link at the root too: the package is found beside it
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
try:
    from mlx_openelm.commands import interrupts
except KeyboardInterrupt:
    os.write(2, b"openelm-mlx: error: interrupted\n")
    os._exit(130)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line: a user's mistake is one line on stderr and status 2, Ctrl-C one line and status 130."""
    interrupts.watch_hooks()
    try:
        interrupts.watch_signal()
        from mlx_openelm.commands.app import run

        status = run(sys.argv[1:])
    except BaseException as error:
        if interrupts.is_interrupt(error):
            interrupts.end_interrupted()
        raise
    interrupts.ignore()
    sys.exit(status)


if __name__ == "__main__":
    main()
