"""Paths: what the system refuses is one line, only regular files are opened, and links do not leave a model folder."""

import os
import socket
from pathlib import Path

import pytest

from mlx_openelm.errors import ConfigError, PathError
from mlx_openelm.files.paths import (
    check_links,
    check_regular,
    exists,
    is_file,
    is_folder,
    open_regular,
    read_text,
    user_path,
)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a" * 5000, "too long"),
        ("a/" * 3000, "too long"),
        ("~nosuchuser/x", "is not a valid path"),
        ("a\0b", "is not a valid path"),
        ("\ud800", "is not a valid path"),
    ],
)
def test_a_path_that_cannot_exist_is_one_short_line(name, problem):
    with pytest.raises(PathError) as raised:
        user_path(name)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_loop_of_links_is_named(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(PathError, match="Too many levels of symbolic links"):
        user_path(tmp_path / "a")


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)  # root may look everywhere
    with pytest.raises(PathError, match="Permission denied"):
        exists(tmp_path / "a")


def test_what_a_path_leads_to(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    assert (user_path(tmp_path / "new"), user_path("~")) == (tmp_path / "new", Path.home())
    names = ("file", "link", "fifo", "new", "file/new", ".")
    assert [exists(tmp_path / name) for name in names] == [True, True, True, False, False, True]
    assert [is_file(tmp_path / name) for name in names] == [True, True, False, False, False, False]
    assert [is_folder(tmp_path / name) for name in names] == [False, False, False, False, False, True]


def test_a_name_of_bytes_that_are_not_utf8_is_a_path(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(name).write_text("x")
    assert read_text(user_path(name), ConfigError) == "x"


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_only_a_regular_file_is_opened_and_nothing_waits(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path("x")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        bound = socket.socket(socket.AF_UNIX)
        bound.bind("x")
    elif kind == "device":
        path = Path(os.devnull)
    else:
        path.mkdir()
    with pytest.raises(OSError, match=rf"a {kind}, not a regular file|No such device"):
        open_regular(path)
    with pytest.raises(ConfigError, match=r"cannot be read: (it is a .*, not a regular file|No such device)"):
        check_regular(path, ConfigError)
    if kind == "socket":
        bound.close()


class TestLinks:
    def folder(self, place):
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        return place

    def test_that_leave_the_folder_are_refused(self, tmp_path):
        folder = self.folder(tmp_path / "model")
        (tmp_path / "secret.json").write_text("{}")
        for target in (tmp_path / "secret.json", "../secret.json", "../missing.json"):
            (folder / "tokenizer.json").symlink_to(target)
            with pytest.raises(PathError, match=r"tokenizer\.json is a link to a file outside its folder"):
                check_links(folder)
            (folder / "tokenizer.json").unlink()

    def test_through_a_link_within_the_folder_are_refused_too(self, tmp_path):
        folder = self.folder(tmp_path / "model")
        (folder / "out").symlink_to("..")
        (folder / "tokenizer.json").symlink_to("out/secret.json")
        with pytest.raises(PathError, match="outside its folder"):
            check_links(folder)

    def test_within_the_folder_and_of_the_folder_itself_work(self, tmp_path):
        folder = self.folder(tmp_path / "model")
        (folder / "params.json").symlink_to("config.json")
        (folder / "data").symlink_to("/")  # no file that is read
        (tmp_path / "link").symlink_to("model")
        assert check_links(tmp_path / "link") == tmp_path / "link"

    def test_of_the_hub_cache_lead_to_its_blobs(self, tmp_path):
        snapshot = self.folder(tmp_path / "models--a--b" / "snapshots" / "abc")
        for name in ("models--a--b", "models--c--d"):
            (tmp_path / name / "blobs").mkdir(parents=True)
            (tmp_path / name / "blobs" / "1").write_text("{}")
        (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
        assert check_links(snapshot) == snapshot
        (snapshot / "more.json").symlink_to("../../../models--c--d/blobs/1")
        with pytest.raises(PathError, match="outside its folder"):
            check_links(snapshot)
