"""Runs a notebook from top to bottom, as `make notebook` does; the file stays as it is.

python scripts/run_notebook.py notebooks/tour.ipynb [--save RESULT.ipynb]
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

_CELL_SECONDS = 300  # more than this is a cell that hangs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--save", type=Path, help="write the notebook with its outputs here")
    arguments = parser.parse_args()
    notebook = nbformat.read(arguments.notebook, as_version=4)
    folder = {"metadata": {"path": str(arguments.notebook.parent)}}
    start = time.monotonic()
    try:
        NotebookClient(notebook, timeout=_CELL_SECONDS, kernel_name="python3", resources=folder).execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if arguments.save is not None:
            nbformat.write(notebook, arguments.save)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{arguments.notebook}: {cells} cells ran in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
