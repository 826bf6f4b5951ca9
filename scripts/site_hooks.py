"""What the documentation site needs besides `docs/`: pages and pictures from other folders of the repository.

MkDocs calls the functions here by their names. Files outside `docs/` appear in the site under their own paths, the
README as the front page. Links in the repository lead to files as they lie there; links to files that are in no page
(code, results) become plain text.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {  # path in the site: path in the repository
    "index.md": "README.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "notebooks/tour.ipynb.md": "notebooks/tour.ipynb",
    "mlx_openelm/assets/openelm-tiny/README.md": "mlx_openelm/assets/openelm-tiny/README.md",
    "mlx_openelm/assets/openelm-tiny/ATTRIBUTION_african_storybook.md": (
        "mlx_openelm/assets/openelm-tiny/ATTRIBUTION_african_storybook.md"
    ),
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are not in `docs/`."""
    for page, source in PAGES.items():
        path = ROOT / source
        text = path.read_text(encoding="utf-8")
        content = notebook_page(text) if path.suffix == ".ipynb" else re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
        files.append(File.generated(config, page, content=content))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links to pages of the site."""
    name = page.file.src_uri
    source = PAGES.get(name, f"docs/{name}")
    sites = {repository: site for site, repository in PAGES.items()}

    def link(match: re.Match[str]) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = sites.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            if not (ROOT / path).exists():
                return match[0]  # MkDocs reports it
            return text
        return f"{mark}[{text}]({posixpath.relpath(place, posixpath.dirname(name) or '.')}{anchor})"

    return _LINK.sub(link, markdown)


def notebook_page(text: str) -> str:
    """A notebook as a page: its texts and its code, without outputs, which depend on the machine."""
    cells = json.loads(text)["cells"]
    parts = []
    for cell in cells:
        content = "".join(cell["source"])
        parts.append(content if cell["cell_type"] == "markdown" else f"```python\n{content}\n```")
    return "\n\n".join(parts) + "\n\nThis page is `notebooks/tour.ipynb`, without outputs.\n"
