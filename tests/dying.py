"""python dying.py AT FOLDER COMMAND...: run `openelm-mlx COMMAND...` and kill it at the AT-th call, like a power cut.

Calls that open, rename, make or remove something in FOLDER count. With AT 0 it runs to its end and tells how many there
were.
"""

import os
import signal
import sys

EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.chmod",
    "os.truncate",
    "shutil.rmtree",
}


def main() -> None:
    at, folder = int(sys.argv[1]), os.path.realpath(sys.argv[2]) + os.sep
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(folder):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = ["openelm-mlx", *sys.argv[3:]]
    from mlx_openelm.cli import main as command

    sys.addaudithook(watch)
    try:
        command()
    finally:
        if at == 0:
            print(f"calls: {count}", file=sys.stderr)


if __name__ == "__main__":
    main()
