"""Writing without loss: what is replaced, what never is, and what stays behind after failures."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from mlx_openelm.errors import OutputError, OutputExistsError, OutputLockedError
from mlx_openelm.files import lock as lock_module, manifest, names, output, rename
from mlx_openelm.files.lock import lock, lock_folder
from mlx_openelm.files.manifest import MANIFEST, UNFINISHED
from mlx_openelm.files.output import move_away, output_file, output_folder, remove_folder, write_file

NEW = {"config.json": "new", "adapter/weights": "new weights"}


def write_folder(path, files=NEW, overwrite=False, sources=()):
    with output_folder(path, overwrite=overwrite) as place:
        place.protect(*sources)
        with place.replaced() as folder:
            for name, text in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)


def tree(folder, hidden=False):
    """Every file below a folder with its content, links as where they lead; without the list that the package keeps."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and (hidden or path.name != MANIFEST):
            found[name] = path.read_text()
    return found


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "MODEL.PT"])
def test_a_new_folder_does_not_get_the_name_of_a_model_file(tmp_path, name):
    with pytest.raises(OutputError, match=r"would be a folder, not a .* file; choose another `output`"):
        write_folder(tmp_path / "new" / name)
    with pytest.raises(OutputError, match="would be a folder"), lock_folder(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir()
    with lock_folder(tmp_path / name):
        pass


class TestFile:
    def test_is_replaced_only_if_asked_to(self, tmp_path):
        write_file(tmp_path / "new" / "a", "old")
        with pytest.raises(OutputExistsError):
            write_file(tmp_path / "new" / "a", "new")
        write_file(tmp_path / "new" / "a", b"new", overwrite=True)
        assert tree(tmp_path) == {"new/a": "new"}

    def test_is_written_where_a_link_leads(self, tmp_path):
        (tmp_path / "link").symlink_to("real")
        write_file(tmp_path / "link", "1")  # a link that leads nowhere yet
        write_file(tmp_path / "link", "2", overwrite=True)
        assert tree(tmp_path) == {"link": "-> real", "real": "2"}

    def test_keeps_its_permissions(self, tmp_path):
        write_file(tmp_path / "a", "old")
        assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o666 & ~_umask()
        os.chmod(tmp_path / "a", 0o600)
        write_file(tmp_path / "a", "new", overwrite=True)
        assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o600

    def test_an_error_leaves_the_old_content_and_nothing_else(self, tmp_path):
        for name in ("new/sub/a", "b"):
            if name == "b":
                write_file(tmp_path / name, "old")
            with pytest.raises(KeyboardInterrupt), output_file(tmp_path / name, overwrite=True) as place:
                with place.replaced() as file:
                    file.write(b"half")
                    raise KeyboardInterrupt
        assert tree(tmp_path) == {"b": "old"}
        assert os.listdir(tmp_path) == ["b"]

    @pytest.mark.parametrize("appears", [True, False])
    def test_what_was_not_there_at_the_start_is_not_replaced(self, tmp_path, appears):
        if not appears:
            write_file(tmp_path / "a", "old")
        with pytest.raises(OutputError, match="in the meantime"), output_file(tmp_path / "a", overwrite=True) as place:
            with place.replaced() as file:
                file.write(b"mine")
                (tmp_path / "a").write_text("somebody else's")
        assert tree(tmp_path) == {"a": "somebody else's"}

    def test_only_regular_files_are_replaced(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
            with pytest.raises(OutputError, match=r"not a regular file|is a folder"):
                write_file(path, "x", overwrite=True)
        assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)
        assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)

    @pytest.mark.parametrize(
        "name", ["~nosuchuser/a", "a" * 300, "file/a", "loop", "/", "loop/a"], ids=lambda name: name[:8]
    )
    def test_a_place_that_cannot_be_written_is_one_error(self, tmp_path, name, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("x")
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(OutputError, match=r"cannot be written|is a folder"):
            write_file(name, "x", overwrite=True)
        assert sorted(os.listdir(tmp_path)) == ["file", "loop"]

    @pytest.mark.parametrize(
        "name", ["[x]*? y", "ü" * 120, "-x", ".hidden", "a\nb"], ids=["glob", "long", "-", ".", "nl"]
    )
    def test_names_of_all_kinds(self, tmp_path, name):
        write_file(tmp_path / name, "1")
        write_folder(tmp_path / f"{name} folder")
        write_folder(tmp_path / f"{name} folder", overwrite=True)
        assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name} folder"])


class TestFolder:
    def test_of_this_package_is_replaced_if_asked_to(self, tmp_path):
        write_folder(tmp_path / "a", {"old": "old", "sub/old": "old"})
        with pytest.raises(OutputExistsError):
            write_folder(tmp_path / "a")
        (tmp_path / "a" / ".DS_Store").write_text("Finder was here")
        (tmp_path / "a" / "old").unlink()
        write_folder(tmp_path / "a", overwrite=True)
        assert tree(tmp_path / "a") == NEW
        assert os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: (folder / "notes.txt").write_text("x"),
            lambda folder: (folder / "config.json").write_text("edited"),
            lambda folder: (folder / "adapter" / "more").write_text("x"),
            lambda folder: (folder / ".git").mkdir(),
            lambda folder: (folder / "link").symlink_to("/etc/hosts"),
            lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("adapter/weights")),
            lambda folder: (folder / MANIFEST).unlink(),
            lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
            lambda folder: (folder / MANIFEST).write_text('{"files": {"/etc/hosts": "", "../x": ""}}'),
        ],
    )
    def test_with_anything_else_in_it_never_is(self, tmp_path, change):
        write_folder(tmp_path / "a", {**NEW, "config.json": "old"})
        change(tmp_path / "a")
        before = tree(tmp_path, hidden=True)
        with pytest.raises(OutputError, match="did not write"):
            write_folder(tmp_path / "a", overwrite=True)
        assert not remove_folder(tmp_path / "a")
        assert tree(tmp_path, hidden=True) == before

    def test_a_large_file_that_was_changed_is_noticed(self, tmp_path):
        write_folder(tmp_path / "a", {"weights": "w" * 5_000_000})
        with open(tmp_path / "a" / "weights", "r+") as file:
            file.seek(4_999_000)
            file.write("x")
        with pytest.raises(OutputError, match="weights"):
            write_folder(tmp_path / "a", overwrite=True)

    def test_a_large_file_with_other_values_of_the_same_size_is_noticed(self, tmp_path):
        """Even where the blocks that are compared are the same, because it was changed at another time."""
        write_folder(tmp_path / "a", {"weights": "w" * 9_000_000})
        with open(tmp_path / "a" / "weights", "r+") as file:
            file.seek(70_000)
            file.write("x")
        with pytest.raises(OutputError, match="weights"):
            write_folder(tmp_path / "a", overwrite=True)

    def test_of_other_programs_is_not_replaced(self, tmp_path):
        for name in ("config.json", "model.safetensors", "README.md"):
            (tmp_path / "a").mkdir(exist_ok=True)
            (tmp_path / "a" / name).write_text("{}")
        with pytest.raises(OutputError, match=r"README\.md, config\.json, model\.safetensors"):
            write_folder(tmp_path / "a", overwrite=True)
        assert len(os.listdir(tmp_path / "a")) == 3

    def test_an_empty_one_is(self, tmp_path):
        (tmp_path / "a").mkdir()
        write_folder(tmp_path / "a", overwrite=True)
        assert tree(tmp_path / "a") == NEW

    @pytest.mark.parametrize("source", ["a", "a/config.json", "link", "linked", "a/../a"])
    def test_never_if_it_holds_a_source(self, tmp_path, source):
        write_folder(tmp_path / "a", {"config.json": "old"})
        (tmp_path / "link").symlink_to("a")
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "config.json").symlink_to("../a/config.json")
        with pytest.raises(OutputError, match="would remove its source"):
            write_folder(tmp_path / "a", overwrite=True, sources=["apple/OpenELM", None, tmp_path / source])
        assert tree(tmp_path / "a") == {"config.json": "old"}

    def test_never_the_current_one(self, tmp_path, monkeypatch):
        write_folder(tmp_path / "a", {"sub/config.json": "old"})
        monkeypatch.chdir(tmp_path / "a" / "sub")
        for path in ("..", tmp_path / "a", "."):
            with pytest.raises(OutputError, match=r"current folder|did not write"):
                write_folder(path, overwrite=True)

    def test_is_written_where_a_link_leads(self, tmp_path):
        write_folder(tmp_path / "real", {"old": "old"})
        (tmp_path / "link").symlink_to("real")
        (tmp_path / "dangling").symlink_to("new")
        write_folder(tmp_path / "link", overwrite=True)
        write_folder(tmp_path / "dangling")
        assert tree(tmp_path / "real") == tree(tmp_path / "new") == NEW
        assert sorted(os.listdir(tmp_path)) == ["dangling", "link", "new", "real"]

    def test_a_path_with_dots_is_that_folder(self, tmp_path):
        write_folder(tmp_path / "m", {"old": "old"})
        write_folder(tmp_path / "m" / ".." / "m", overwrite=True)
        assert tree(tmp_path / "m") == NEW
        assert os.listdir(tmp_path) == ["m"]

    @pytest.mark.parametrize("exchange", [True, False], ids=["at once", "two renames"])
    @pytest.mark.parametrize("what", ["folder", "file", "link"])
    def test_what_appears_meanwhile_stays(self, tmp_path, what, exchange, monkeypatch):
        if not exchange:
            monkeypatch.setattr(rename, "_rename_with_flag", lambda *_: False)
        with pytest.raises(OutputError, match="in the meantime"), output_folder(tmp_path / "a") as place:
            with place.replaced() as folder:
                (folder / "config.json").write_text("mine")
                if what == "folder":
                    (tmp_path / "a").mkdir()
                    (tmp_path / "a" / "precious").write_text("x")
                elif what == "file":
                    (tmp_path / "a").write_text("precious")
                else:
                    (tmp_path / "a").symlink_to("nowhere")
        assert (
            tree(tmp_path)
            == {"folder": {"a/precious": "x"}, "file": {"a": "precious"}, "link": {"a": "-> nowhere"}}[what]
        )
        assert os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "added to"])
    def test_what_is_changed_meanwhile_stays(self, tmp_path, replaced):
        write_folder(tmp_path / "a", {"old": "old"})
        with pytest.raises(OutputError, match=r"in the meantime|did not write"):
            with output_folder(tmp_path / "a", overwrite=True) as place, place.replaced() as folder:
                (folder / "config.json").write_text("mine")
                if replaced:
                    shutil.rmtree(tmp_path / "a")
                    (tmp_path / "a").mkdir()
                (tmp_path / "a" / "precious").write_text("x")
        assert "precious" in tree(tmp_path / "a")
        assert os.listdir(tmp_path) == ["a"]

    def test_without_the_call_that_exchanges_the_old_one_comes_back(self, tmp_path, monkeypatch):
        write_folder(tmp_path / "a", {"old": "old"})
        monkeypatch.setattr(rename, "_rename_with_flag", lambda *_: False)
        write_folder(tmp_path / "a", {"old": "newer"}, overwrite=True)
        assert tree(tmp_path) == {"a/old": "newer"}

        def second_fails(old, new):
            calls.append(new)
            if len(calls) == 2:
                raise OSError(errno.EIO, "input/output error")
            os.rename(old, new)

        calls = []
        monkeypatch.setattr(rename, "rename_new", second_fails)
        real = rename.os
        monkeypatch.setattr(rename, "os", _Proxy(real, {"rename": second_fails}))
        with pytest.raises(OutputError, match="input/output error"):
            write_folder(tmp_path / "a", overwrite=True)
        assert tree(tmp_path) == {"a/old": "newer"}
        assert os.listdir(tmp_path) == ["a"]


def test_a_folder_is_removed_only_if_it_is_as_it_was_written(tmp_path):
    with lock_folder(tmp_path):
        write_folder(tmp_path / "a")
        assert remove_folder(tmp_path / "a")
        assert not remove_folder(tmp_path / "missing")
    assert os.listdir(tmp_path) == []


def test_a_link_to_a_folder_is_not_removed(tmp_path):
    write_folder(tmp_path / "elsewhere")
    (tmp_path / "a").symlink_to("elsewhere")
    assert not remove_folder(tmp_path / "a")
    assert tree(tmp_path / "elsewhere") == NEW
    assert sorted(os.listdir(tmp_path)) == ["a", "elsewhere"]


def test_a_file_that_is_read_is_not_replaced(tmp_path):
    (tmp_path / "input").write_text("x")
    (tmp_path / "link").symlink_to("input")
    for name in ("input", "link"):
        with (
            output_file(tmp_path / name, overwrite=True) as place,
            pytest.raises(OutputError, match="is also an input"),
        ):
            place.protect(None, tmp_path / "missing", tmp_path / "input")


def test_what_is_moved_away_replaces_nothing(tmp_path):
    for number in range(3):
        (tmp_path / "a").write_text(str(number))
        move_away(tmp_path / "a", "old")
    assert tree(tmp_path) == {"old": "0", "old-2": "1", "old-3": "2"}


class TestLeftovers:
    """What processes leave that are killed, and what the next one makes of it."""

    @staticmethod
    def leave(tmp_path, monkeypatch, at, overwrite=False):
        """Do as if the process ended at the n-th call that changes a file."""
        with monkeypatch.context() as patch:
            _interrupt(patch, at, KeyboardInterrupt, forever=True)
            try:
                write_folder(tmp_path / "m [1]*", overwrite=overwrite)
            except KeyboardInterrupt:
                return True
        return False

    @pytest.mark.parametrize("exchange", [True, False], ids=["at once", "two renames"])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_are_removed_or_put_back_by_the_next_process(self, tmp_path, monkeypatch, overwrite, exchange):
        if not exchange:
            monkeypatch.setattr(rename, "_rename_with_flag", lambda *_: False)
        target = tmp_path / "m [1]*"
        for at in range(1, 100):
            shutil.rmtree(target, ignore_errors=True)
            if overwrite:
                write_folder(target, {"old": "old"})
            ended = self.leave(tmp_path, monkeypatch, at, overwrite)
            with lock(target):
                pass
            assert not target.exists() or tree(target) in ({"old": "old"}, NEW)
            assert target.exists() or not overwrite
            assert [name for name in os.listdir(tmp_path) if name != target.name] == []
            if not ended:
                break
        assert 10 < at < 99

    def test_of_others_stay(self, tmp_path):
        """Names that look like those of leftovers, and are not such."""
        kept = [".m.partial-123", ".m.openelm-mlx-xyz", ".m.replaced-9", ".other.openelm-mlx-new-0123456789abcdef"]
        for name in kept:
            (tmp_path / name).mkdir()
            (tmp_path / name / "precious").write_text("x")
        (tmp_path / ".m.openelm-mlx-new-0123456789abcdef").symlink_to("/etc")
        strange = tmp_path / ".m.openelm-mlx-new-fedcba9876543210"  # whole, but not written by this package
        strange.mkdir()
        (strange / "precious").write_text("x")
        (tmp_path / "m").mkdir()
        write_folder(tmp_path / "m", overwrite=True)
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, ".m.openelm-mlx-new-0123456789abcdef", strange.name, "m"])
        assert (strange / "precious").exists()

    def test_old_content_that_was_partly_removed_does_not_come_back(self, tmp_path):
        write_folder(tmp_path / "m")
        old = (tmp_path / "m").rename(tmp_path / ".m.openelm-mlx-old-0123456789abcdef")
        (old / "config.json").unlink()
        write_folder(tmp_path / "m", {"new": "new"})
        assert tree(tmp_path) == {"m/new": "new"}
        assert os.listdir(tmp_path) == ["m"]

    def test_a_whole_folder_that_only_lacks_its_name_gets_it(self, tmp_path):
        write_folder(tmp_path / "m")
        (tmp_path / "m").rename(tmp_path / ".m.openelm-mlx-new-0123456789abcdef")
        with pytest.raises(OutputExistsError):
            write_folder(tmp_path / "m")
        assert tree(tmp_path) == {f"m/{name}": text for name, text in NEW.items()}


_HOLD = """
import sys
from mlx_openelm.files.lock import lock, lock_folder
from pathlib import Path
with (lock if sys.argv[1] == "lock" else lock_folder)(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestLock:
    @staticmethod
    def hold(kind, path):
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, kind, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "held\n"
        return process

    @pytest.mark.parametrize("kind", ["lock", "lock_folder"])
    def test_the_second_process_is_told_the_first_ones_number(self, tmp_path, kind):
        process = self.hold(kind, tmp_path / "new" / "a")
        again = lock if kind == "lock" else lock_folder
        with pytest.raises(OutputLockedError, match=f"process {process.pid} is writing"), again(tmp_path / "new" / "a"):
            pass
        process.communicate("")
        with again(tmp_path / "new" / "a"):
            pass
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("kind", ["lock", "lock_folder"])
    def test_a_killed_process_holds_nothing(self, tmp_path, kind):
        process = self.hold(kind, tmp_path / "a")
        process.kill()
        process.communicate()
        with (lock if kind == "lock" else lock_folder)(tmp_path / "a"):
            pass
        assert [path.name for path in tmp_path.rglob("*") if path.name != "a"] == []

    def test_a_link_to_a_locked_place_is_locked(self, tmp_path):
        (tmp_path / "link").symlink_to("a")
        process = self.hold("lock", tmp_path / "a")
        with pytest.raises(OutputLockedError), output_file(tmp_path / "link"):
            pass
        process.communicate("")

    def test_the_same_process_is_no_exception(self, tmp_path):
        with (
            lock(tmp_path / "a"),
            pytest.raises(OutputLockedError, match="this process is writing"),
            lock(tmp_path / "a"),
        ):
            pass
        with lock_folder(tmp_path / "run"), pytest.raises(OutputLockedError), lock_folder(tmp_path / "run"):
            pass
        assert os.listdir(tmp_path) == []

    def test_what_others_write_in_a_locked_folder_is_left_alone(self, tmp_path):
        """Neither a picture in the folder of a run, nor what goes to a folder that runs share."""
        (tmp_path / "run").mkdir()
        (tmp_path / "shared").mkdir()
        (tmp_path / "run" / "corpus").symlink_to("../shared")
        with output_file(tmp_path / "run" / "a") as file, output_folder(tmp_path / "shared" / "b") as folder:
            with file.replaced() as content, folder.replaced() as place:
                with lock_folder(tmp_path / "run", "corpus", "missing"):
                    assert len(list(tmp_path.rglob(".*openelm-mlx-new-*"))) == 2
                content.write(b"x")
                (place / "y").write_text("y")
        assert tree(tmp_path) == {"run/a": "x", "run/corpus": "-> ../shared", "shared/b/y": "y"}

    def test_what_killed_writers_left_in_a_folder_is_removed(self, tmp_path):
        write_folder(tmp_path / "run" / "step-1")
        half = tmp_path / "run" / ".step-2.openelm-mlx-new-0123456789abcdef"
        shutil.copytree(tmp_path / "run" / "step-1", half)
        (half / UNFINISHED).touch()
        shutil.copytree(tmp_path / "run" / "step-1", tmp_path / "run" / ".step-0.openelm-mlx-old-0123456789abcdef")
        (tmp_path / "run" / ".step-2.openelm-mlx.lock").write_text("99999999")
        (tmp_path / "run" / ".metrics.openelm-mlx-new-0123456789abcdef").write_text("half")
        with lock_folder(tmp_path / "run"):
            pass
        assert os.listdir(tmp_path / "run") == ["step-1"]

    def test_a_file_under_the_name_of_a_lock_keeps_its_content(self, tmp_path):
        (tmp_path / "precious").write_text("precious")
        os.link(tmp_path / "precious", tmp_path / ".a.openelm-mlx.lock")
        with pytest.raises(OutputError, match="is not a lock"):
            write_file(tmp_path / "a", "x")
        assert (tmp_path / "precious").read_text() == "precious"
        os.unlink(tmp_path / ".a.openelm-mlx.lock")
        (tmp_path / ".a.openelm-mlx.lock").write_text("my own lock")
        with pytest.raises(OutputError, match="is not a lock"):
            write_file(tmp_path / "a", "x")
        assert (tmp_path / ".a.openelm-mlx.lock").read_text() == "my own lock"

    def test_of_a_folder_that_was_renamed_meanwhile(self, tmp_path):
        with lock_folder(tmp_path / "run"):
            (tmp_path / "run").rename(tmp_path / "moved")
            process = self.hold("lock_folder", tmp_path / "run")
        with pytest.raises(OutputLockedError), lock_folder(tmp_path / "run"):  # the other one's lock is still there
            pass
        process.communicate("")


class _Proxy:
    """A module with some functions replaced."""

    def __init__(self, module, functions):
        self.__dict__.update(functions)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


_CHANGING = (
    "open",
    "fsync",
    "chmod",
    "mkdir",
    "makedirs",
    "rmdir",
    "unlink",
    "rename",
    "replace",
    "link",
    "scandir",
    "lstat",
)


def _interrupt(patch, at, error, forever=False):
    """Let the `at`-th system call of the package raise `error`, and all later ones if nothing runs any more then."""
    count = 0

    def failing(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == at or (forever and count > at):
                raise error() if isinstance(error, type) else error
            return function(*arguments, **options)

        return call

    proxy = _Proxy(os, {name: failing(getattr(os, name)) for name in _CHANGING})
    for module in (lock_module, manifest, names, output, rename):
        patch.setattr(module, "os", proxy)
    patch.setattr(rename, "_rename_with_flag", failing(rename._rename_with_flag))
    patch.setattr(manifest, "shutil", _Proxy(shutil, {"rmtree": failing(shutil.rmtree)}))


_NAMES = st.sampled_from(["config.json", "README.md", "notes", "sub/config.json", "sub/deep/x", "m[1]", ".git/HEAD"])
_TREES = st.dictionaries(_NAMES, st.sampled_from(["a", "b"]), max_size=4)
_OPERATIONS = st.tuples(
    st.sampled_from(["folder", "file", "user writes", "user removes"]),
    st.sampled_from(["m", "n", "m/sub", "link", "n/../m"]),
    _TREES,
    st.booleans(),  # overwrite
    st.integers(0, 60),  # the system call that fails; 0: none
    st.sampled_from([errno.ENOSPC, errno.EIO, errno.EACCES, KeyboardInterrupt]),
    st.booleans(),  # whether all later ones fail too, as in a process that was killed
)


class TestAnyOrderOfEvents:
    """The property: no file that the package did not write is changed or removed; old or new content, never neither."""

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operations=st.lists(_OPERATIONS, min_size=1, max_size=8), exchange=st.booleans())
    def test_keeps_every_file_of_others(self, tmp_path_factory, operations, exchange):
        _keeps_every_file_of_others(tmp_path_factory.mktemp("p"), operations, exchange)

    @pytest.mark.slow
    @settings(max_examples=10_000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operations=st.lists(_OPERATIONS, min_size=1, max_size=12), exchange=st.booleans())
    def test_keeps_every_file_of_others_10000_times(self, tmp_path_factory, operations, exchange):
        _keeps_every_file_of_others(tmp_path_factory.mktemp("p"), operations, exchange)


def _keeps_every_file_of_others(root, operations, exchange):
    (root / "link").symlink_to("m")
    theirs: dict[Path, str] = {}  # what others wrote and the package has to leave alone
    whole: dict[Path, list] = {}  # what commands have tried to write
    for number, (kind, name, files, overwrite, at, error, killed) in enumerate(operations):
        target = Path(os.path.realpath(root / name))
        if kind == "user writes":
            for inner, text in files.items():
                path = target / inner
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(f"theirs {text}")
                    theirs[path] = f"theirs {text}"
                except OSError:
                    pass  # a file where a folder would be needed
        elif kind == "user removes":
            for path in [path for path in theirs if path.is_relative_to(target)]:
                path.unlink()
                del theirs[path]
        else:
            before = _content(target)
            if before is None and target.parent.is_dir():
                with lock(target):  # a command that was killed just before its last rename is finished by the next one
                    pass
                before = _content(target)
                assert before in (None, *whole.get(target, [])), operations
            new = {inner: f"{number} {text}" for inner, text in files.items()} or {"x": str(number)}
            new = {
                inner: text
                for inner, text in new.items()
                if not any(o != inner and o.startswith(f"{inner}/") for o in new)
            }
            with pytest.MonkeyPatch.context() as patch:
                if not exchange:
                    patch.setattr(rename, "_rename_with_flag", lambda *_: False)
                _interrupt(patch, at, error if isinstance(error, type) else OSError(error, os.strerror(error)), killed)
                try:
                    if kind == "file":
                        write_file(root / name, f"{number}", overwrite=overwrite)
                    else:
                        _write_tree(root / name, new, overwrite)
                    done = True
                except (OutputError, KeyboardInterrupt):
                    done = False
                except OSError:  # of the writing within the block, while all later calls fail
                    assert killed
                    done = False
            after = _content(target)
            wanted = f"{number}" if kind == "file" else new
            whole.setdefault(target, []).append(wanted)
            if after is None and before is not None:
                with lock(target):  # what a killed process moved away comes back
                    pass
                after = _content(target)
            assert after in ((wanted,) if done else (before, wanted)), (operations, before, after)
            if before is not None and not overwrite:
                assert after == before
        for path, text in theirs.items():
            assert path.read_text() == text, (operations, path)
    for name in ("m", "n", "m/sub"):
        if (root / name).parent.is_dir():
            with lock(root / name):
                pass
    left = [path for path in root.rglob(".*openelm-mlx*") if path.name not in (MANIFEST,)]
    assert left == [], operations


def _write_tree(path, files, overwrite):
    with output_folder(path, overwrite=overwrite) as place, place.replaced() as folder:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


def _content(path):
    """Content of a file, tree of a folder, or None."""
    if path.is_dir():
        return tree(path)
    return path.read_text() if path.exists() else None


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_list_of_files_is_json_that_people_can_read(tmp_path):
    write_folder(tmp_path / "a")
    values = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert sorted(values["files"]) == ["adapter/weights", "config.json"]
    assert UNFINISHED not in os.listdir(tmp_path / "a")


@pytest.mark.parametrize("length", [1, 250, 251, 255])
def test_a_name_with_an_ending_is_never_too_long(tmp_path, length):
    found = names.with_ending(tmp_path / ("b" * length), ".part")
    assert found.name == "b" * length + ".part" if length <= 250 else found.name.startswith("bbb")
    found.write_text("")
    assert found != names.with_ending(tmp_path / ("b" * (length - 1) + "c"), ".part")
