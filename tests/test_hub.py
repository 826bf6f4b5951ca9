"""Names of models: folders, the built-in model, and the hub, whose client is replaced here."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from mlx_openelm import hub
from mlx_openelm.errors import PathError, SourceError


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """What was asked of the hub."""
    asked = []

    def snapshot(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_a_folder_comes_before_a_repository_of_its_name(tmp_path, monkeypatch, downloads):
    (tmp_path / "apple" / "OpenELM-270M").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(hub.model_folder("apple/OpenELM-270M")) == "apple/OpenELM-270M"
    assert downloads == []


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert hub.model_folder("~/model") == tmp_path / "model"


def test_the_built_in_model_needs_no_hub(downloads):
    assert (hub.model_folder(hub.BUILT_IN_MODEL) / "config.json").is_file()
    assert downloads == []


def test_a_repository_is_downloaded_at_its_revision_without_what_nobody_reads(downloads, tmp_path):
    assert hub.model_folder("apple/OpenELM-270M", "v1") == tmp_path
    ((repo_id, options),) = downloads
    assert (repo_id, options["revision"]) == ("apple/OpenELM-270M", "v1")
    assert set(options["allow_patterns"]) == {"*.json", "*.safetensors", "tokenizer.model"}


@pytest.mark.parametrize("name", ["missing", "a/b/c", "./a/b", "../b", "a b/c", ""])
def test_what_can_be_no_repository_is_not_asked_for(name, downloads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert hub.model_folder(name).is_dir()  # the current folder
    else:
        with pytest.raises(SourceError, match="does not exist"):
            hub.model_folder(name)
    assert downloads == []


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(SourceError, match="is a file"):
        hub.model_folder(tmp_path / "model.pt")


def raised(kind, message="no"):
    """An error of the hub's client, without the response that its own constructor wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (raised(errors.GatedRepoError), "is gated: request access"),
        (raised(errors.RepositoryNotFoundError), "nor a repository"),
        (raised(errors.RevisionNotFoundError), "no such revision"),
        (raised(errors.LocalEntryNotFoundError), "the hub cannot be reached"),
        (raised(errors.EntryNotFoundError), "file"),
        (ConnectionError("two\nlines"), "cannot be downloaded: two lines"),
        (ValueError(), "cannot be downloaded: ValueError"),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch, error, said):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    for ask in (lambda: hub.model_folder("apple/x"), lambda: hub.download_file("apple/x", "tokenizer.model")):
        with pytest.raises(SourceError, match=said) as found:
            ask()
        assert str(found.value).startswith("apple/x ")
        assert "\n" not in str(found.value)


def test_a_file_in_the_cache_is_found_without_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(tmp_path / name))
    assert hub.cached_file("a/b", "x") == tmp_path / "x"
    for nothing in (None, object()):  # the client has a mark for files that are known not to exist
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name, found=nothing: found)
        assert hub.cached_file("a/b", "x") is None


def test_links_that_leave_a_model_folder_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(PathError, match="outside its folder"):
        hub.model_folder(tmp_path / "model")


@pytest.mark.parametrize("name", ["a" * 5000, "~nosuchuser/x", "a\0b", "\ud800"])
def test_names_that_the_system_refuses_are_one_line(name):
    with pytest.raises(PathError) as raised:
        hub.model_folder(name)
    assert len(str(raised.value)) < 300
