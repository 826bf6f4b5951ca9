"""The scripts that run the documents and check a release, and the workflow that uses them."""

import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from mlx_openelm.version import __version__

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a NamedTuple looks there for its annotations
    spec.loader.exec_module(module)
    return module


release = script("release")
journeys = script("journeys")


class TestRelease:
    def test_the_version_stands_in_one_place_and_the_citation_follows_it(self):
        assert release.version() == __version__
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        assert citation["version"] == __version__
        assert "version" not in re.findall(r"^(\w+) = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[:8]

    def test_the_changelog_has_the_sections_of_keep_a_changelog(self):
        text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert versions[0] == "[Unreleased]"
        assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
        kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
        assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

    def test_the_notes_are_the_section_of_the_version(self):
        text = "# Changelog\n\n## [0.2.0] - 2026-12-01\n\n* New.\n\n## [0.1.0] - 2026-11-01\n\n* Old.\n"
        assert release.changes("0.2.0", text) == "* New.\n"
        assert release.changes("0.1.0", text) == "* Old.\n"

    @pytest.mark.parametrize(
        "text", ["## [Unreleased]\n\n* New.\n", "## [0.2.0]\n\n* New.\n", "## [0.2.0] - 2026-12-01\n"]
    )
    def test_a_version_without_changes_or_a_date_is_refused(self, text):
        with pytest.raises(release.ReleaseError, match="no section of the form"):
            release.changes("0.2.0", text)

    def test_another_tag_is_refused(self):
        with pytest.raises(
            release.ReleaseError, match=re.escape(f"v9.9.9, but mlx_openelm/version.py says {__version__}")
        ):
            release.check_tag("v9.9.9")
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "release.py", "--tag", "v9.9.9"], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (1, "")

    def packages(self, folder, wheel=("mlx_openelm/cli.py",), archive=(), size=10):
        with zipfile.ZipFile(folder / "openelm_mlx-1-py3-none-any.whl", "w") as file:
            for name in (*wheel, "openelm_mlx-1.dist-info/METADATA"):
                file.writestr(name, b"\0" * size)
        with tarfile.open(folder / "openelm_mlx-1.tar.gz", "w:gz") as file:
            for name in ("LICENSE", "README.md", "CHANGELOG.md", "tests/conftest.py", *archive):
                file.addfile(tarfile.TarInfo(f"openelm_mlx-1/{name}"), io.BytesIO())
        return folder

    def test_packages_hold_what_belongs_in_them(self, tmp_path):
        assert len(release.check_files(self.packages(tmp_path))) == 2
        with pytest.raises(release.ReleaseError, match=r"tests/test_x\.py"):
            release.check_files(self.packages(tmp_path, wheel=("tests/test_x.py",)))
        with pytest.raises(release.ReleaseError, match=r"\.ci/run"):
            release.check_files(self.packages(tmp_path, archive=(".ci/run",)))
        with pytest.raises(release.ReleaseError, match="at most 20,000,000"):
            release.check_files(self.packages(tmp_path, size=release.LARGEST_WHEEL))
        (tmp_path / "openelm_mlx-1.tar.gz").unlink()
        with pytest.raises(release.ReleaseError, match="found 1 and 0"):
            release.check_files(tmp_path)


class TestReleaseWorkflow:
    WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    JOBS = WORKFLOW["jobs"]

    def test_only_a_tag_publishes_and_only_what_was_tested(self):
        publish = self.JOBS["publish"]
        assert "refs/tags/" in publish["if"]
        assert set(publish["needs"]) == {"build", "test"}
        assert self.JOBS["notes"]["needs"] == "publish"

    def test_no_password_is_needed_and_other_jobs_may_only_read(self):
        assert self.WORKFLOW["permissions"] == {"contents": "read"}
        assert self.JOBS["publish"]["permissions"] == {"id-token": "write"}
        text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
        assert "secrets." not in text
        assert "password:" not in text

    def test_both_packages_are_tried_on_apple_silicon_and_linux(self):
        matrix = self.JOBS["test"]["strategy"]["matrix"]
        assert {"macos-15", "ubuntu-24.04"} <= set(matrix["os"])
        assert set(matrix["file"]) == {"*.whl", "*.tar.gz"}
        assert matrix["python"] == ["3.10", "3.13"]

    def test_scripts_exist_and_jobs_end(self):
        for job in self.JOBS.values():
            assert 0 < job["timeout-minutes"] <= 30
            for step in job["steps"]:
                for name in re.findall(r"scripts/\w+\.py", step.get("run", "")):
                    assert (ROOT / name).exists()


class TestJourneys:
    def test_blocks_and_commands_are_found_in_their_order(self):
        shell = "```sh\none  # first\n\n# not run\ntwo \\\n  more\n```\n"
        text = f"# A\n\n{shell}\n```json\n{{}}\n```\n\n```python\nx = 1\n```\n"
        first, second = journeys.blocks(text)
        assert list(journeys.commands(first)) == ["one  # first", "two    more"]
        assert (first.line, second) == (4, ("python", "x = 1\n", 16))

    def test_everything_runs_but_for_what_has_a_reason(self):
        assert journeys.left_out("openelm-mlx pretrain --config 270M --data x") == "takes days"
        assert journeys.left_out('openelm-mlx generate --prompt "x"') is None
        commands = [
            command
            for name in journeys.DOCUMENTS
            for block in journeys.blocks((ROOT / name).read_text(encoding="utf-8"))
            if block.language == "sh"
            for command in journeys.commands(block)
        ]
        assert len([command for command in commands if journeys.left_out(command)]) == len(journeys.LEFT_OUT)
        assert len(commands) > 50

    def test_every_tutorial_and_guide_is_a_journey(self):
        pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*/*.md")} - {"docs/reference/python.md"}
        assert pages | {"README.md"} == set(journeys.DOCUMENTS)

    def test_models_of_apple_are_provided(self):
        text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in journeys.DOCUMENTS)
        commands = re.findall(r"openelm-mlx convert apple/([\w.-]+)", text)
        assert set(commands) == set(journeys.APPLE)
        assert {"openelm-tiny", "openelm-tiny-instruct"} == set(journeys.APPLE.values())

    def test_a_command_that_fails_ends_the_run_with_its_place(self, tmp_path, monkeypatch):
        class Failing:
            programs = tmp_path

            def run(self, words, text="", *, cached=False):
                return subprocess.run(["bash", "-c", "echo it broke; exit 3"], capture_output=True, text=True)

            def provide(self):
                pass

        monkeypatch.setattr(journeys, "ROOT", tmp_path)
        (tmp_path / "a.md").write_text("# A\n\n```sh\nfail now\n```\n")
        with pytest.raises(SystemExit, match=r"(?s)a\.md:4: exit status 3\nfail now\n.*it broke"):
            journeys.run_document("a.md", Failing())
