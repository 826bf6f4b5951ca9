"""What a release needs: one version everywhere, a section in the changelog, and packages with what belongs in them.

python scripts/release.py --tag v0.2.0 [--notes FILE]   # before building
python scripts/release.py --files dist                  # afterwards

The version is defined in `mlx_openelm/version.py` alone. To release, set it there and in `CITATION.cff`, give the
changelog's "Unreleased" section its number and date, and push a tag of the same number.
"""

import argparse
import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LARGEST_WHEEL = 20_000_000  # bytes


class ReleaseError(Exception):
    """Something is missing or contradicts something else."""


def version() -> str:
    """The version in `mlx_openelm/version.py`."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "mlx_openelm" / "version.py").read_text(encoding="utf-8"))
    assert found, "version.py defines no version"
    return found[1]


def changes(number: str, changelog: str) -> str:
    """The section of a version in the changelog.

    Raises:
        ReleaseError: if there is none with a date and content.
    """
    heading = rf"## \[{re.escape(number)}\] - \d{{4}}-\d\d-\d\d\n"
    found = re.search(heading + r"(.*?)(?=\n## |\Z)", changelog, re.DOTALL)
    if found is None or not found[1].strip():
        raise ReleaseError(f"CHANGELOG.md has no section of the form `## [{number}] - YYYY-MM-DD`")
    return found[1].strip() + "\n"


def check_tag(tag: str) -> str:
    """The changes of the version that a tag names.

    Raises:
        ReleaseError: if the tag, the version, the citation and the changelog do not agree.
    """
    number = version()
    if tag != f"v{number}":
        raise ReleaseError(f"the tag is {tag}, but mlx_openelm/version.py says {number}")
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1] != number:
        raise ReleaseError(f"CITATION.cff must say version: {number}")
    return changes(number, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))


def check_files(folder: Path) -> list[str]:
    """Names and sizes of the wheel and the source archive in a folder.

    Raises:
        ReleaseError: if one of them is missing, too large, or contains what does not belong in it.
    """
    wheels, archives = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(archives) != 1:
        raise ReleaseError(f"{folder} must contain one wheel and one .tar.gz; found {len(wheels)} and {len(archives)}")
    if wheels[0].stat().st_size > LARGEST_WHEEL:
        raise ReleaseError(f"{wheels[0].name} has {wheels[0].stat().st_size:,} bytes; at most {LARGEST_WHEEL:,}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        strays = [n for n in wheel.namelist() if not n.startswith(("mlx_openelm/", "openelm_mlx-"))]
    with tarfile.open(archives[0]) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    strays += [name for name in inside if name.startswith(("shared", ".ci", "runs")) or "__pycache__" in name]
    if strays:
        raise ReleaseError(f"does not belong in a package: {', '.join(strays[:5])}")
    missing = {"LICENSE", "README.md", "CHANGELOG.md", "tests/conftest.py"} - set(inside)
    if missing:
        raise ReleaseError(f"{archives[0].name} lacks {', '.join(sorted(missing))}")
    return [f"{path.name}: {path.stat().st_size / 1e6:.1f} MB" for path in (*wheels, *archives)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag")
    parser.add_argument("--notes", type=Path, help="file for the changes of this version")
    parser.add_argument("--files", type=Path, help="folder with the wheel and the source archive")
    arguments = parser.parse_args()
    try:
        if arguments.tag is not None:
            notes = check_tag(arguments.tag)
            if arguments.notes is not None:
                arguments.notes.write_text(notes, encoding="utf-8")
        for line in check_files(arguments.files) if arguments.files is not None else []:
            print(line)
    except ReleaseError as error:
        print(f"release.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
