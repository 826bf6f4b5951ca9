"""Names of models: folders, the hub, whose client is replaced or talks to a server in this process."""

import http.server
import json
import socket
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from mlx_openelm import hub, hub_client
from mlx_openelm.errors import HubUnreachableError, PathError, SourceError, TokenizerError
from mlx_openelm.tokenizer import files as tokenizer_files


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """What was asked of the hub."""
    asked = []

    def snapshot(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    contents(monkeypatch, "config.json", "model.safetensors", "pytorch_model.bin")
    return asked


def contents(monkeypatch, *names):
    """Let every repository of the hub contain these files."""
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, **options: info)


def test_a_folder_comes_before_a_repository_of_its_name(tmp_path, monkeypatch, downloads):
    (tmp_path / "apple" / "OpenELM-270M").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(hub.model_folder("apple/OpenELM-270M")) == "apple/OpenELM-270M"
    assert downloads == []


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert hub.model_folder("~/model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["openelm-tiny", "openelm-tiny-instruct"])
def test_a_built_in_model_needs_no_hub(name, downloads):
    assert (hub.model_folder(name) / "config.json").is_file()
    assert name in hub.BUILT_IN_MODELS
    assert downloads == []


def test_a_repository_is_downloaded_at_its_revision_without_what_nobody_reads(downloads, tmp_path):
    assert hub.model_folder("apple/OpenELM-270M", "v1") == tmp_path
    ((repo_id, options),) = downloads
    assert (repo_id, options["revision"]) == ("apple/OpenELM-270M", "v1")
    assert set(options["allow_patterns"]) == {"*.json", "*.jinja", "*.safetensors", "tokenizer.model", "README.md"}


def test_weights_of_pytorch_are_downloaded_where_there_are_no_others(downloads, monkeypatch):
    contents(monkeypatch, "config.json", "pytorch_model.bin")
    hub.model_folder("apple/OpenELM-270M")
    ((_, options),) = downloads
    assert "pytorch_model*.bin" in options["allow_patterns"]


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
        (raised(errors.LocalEntryNotFoundError), "cannot be reached: its connection was lost"),
        (raised(errors.EntryNotFoundError), "file"),
        (ConnectionError("two\nlines"), "cannot be downloaded: two lines"),
        (ValueError(), "cannot be downloaded: ValueError"),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch, error, said):
    def failing(*arguments, **options):
        raise error

    contents(monkeypatch)
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


SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/model"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"x",
    "tokenizer.model": b"t",
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """A hub with one repository; `server.fault(request)` may answer in its place, and then returns true."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.fault(self):
            return
        name = self.path.rsplit("/", 1)[-1]
        if f"/{REPO}" not in self.path:
            self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in self.path and name in self.server.files:
            self.say(200, self.server.files[name], {"X-Repo-Commit": SHA, "ETag": f'"{name}"'})
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.server.files.items()]
            self.say(200, json.dumps(tree).encode())
        elif "/resolve/" in self.path:
            self.say(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.say(200, json.dumps({"id": REPO, "sha": SHA, "siblings": siblings}).encode())

    do_GET = do_HEAD = answer

    def say(self, status, body=b"", headers=(), length=None):
        self.send_response(status)
        for name, value in {"Content-Length": length or len(body), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The hub, with an empty cache on this side."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as running:
        running.daemon_threads, running.block_on_close = True, False
        running.fault = lambda request: False
        running.files = dict(FILES)
        running.requests = []
        running.handle_error = lambda *_: None  # a client that hangs up
        use_hub(monkeypatch, f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


def use_hub(monkeypatch, url):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def status(code, headers=()):
    """The fault of a hub that always answers this."""
    return lambda request: request.say(code, b"{}", headers) or True


def test_a_model_is_downloaded_once_and_then_found_without_a_hub(server):
    folder = hub.model_folder(REPO)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: content for name, content in FILES.items() if name != "pytorch_model.bin"
    }
    server.fault = status(503)
    server.requests.clear()
    assert hub.model_folder(REPO) == folder
    assert hub.download_file(REPO, "tokenizer.model").read_bytes() == b"t"
    assert len(server.requests) == 2  # a single attempt each


def test_a_cached_model_of_pytorch_is_found_whole_without_a_hub(server):
    del server.files["model.safetensors"]
    folder = hub.model_folder(REPO)
    server.fault = status(500)
    assert (hub.model_folder(REPO) / "pytorch_model.bin").is_file()
    assert hub.model_folder(REPO) == folder


def no_port(server, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")


def silent(server, monkeypatch):
    """It accepts a connection and says nothing."""
    monkeypatch.setattr(hub_client, "_TIMEOUT", 0.2)
    server.fault = lambda request: time.sleep(30) or True


def trickling(server, monkeypatch):
    """It sends a byte now and then, so that no time limit for a single read is exceeded."""
    monkeypatch.setattr(hub_client, "_FIRST_CONTACT", 0.5)

    def trickle(request):
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        for _ in range(100):
            request.wfile.write(b" ")
            time.sleep(0.1)
        return True

    server.fault = trickle


def hanging_up(server, monkeypatch):
    server.fault = lambda request: request.connection.shutdown(socket.SHUT_RDWR) or True


def answering(code, headers=()):
    def answer(server, monkeypatch):
        server.fault = status(code, headers)

    return answer


def a_page_of_a_hotel(server, monkeypatch):
    server.fault = lambda request: request.say(200, b"<html>Welcome! Please log in.</html>") or True


def offline(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_such_host(server, monkeypatch):
    use_hub(monkeypatch, "http://nowhere.invalid")


def no_url(server, monkeypatch):
    use_hub(monkeypatch, "nonsense")


def wrong_proxy(server, monkeypatch):
    no_port(server, monkeypatch)
    monkeypatch.setenv("http_proxy", constants.ENDPOINT)
    monkeypatch.setenv("no_proxy", "")
    use_proxy = "http://hub.invalid"
    monkeypatch.setattr(constants, "ENDPOINT", use_proxy)


REFUSALS = [
    no_port, silent, trickling, hanging_up, answering(500), answering(503), answering(429, {"Retry-After": "300"}),
    answering(408), a_page_of_a_hotel, offline, no_such_host, no_url, wrong_proxy,
]  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_first_refusal_of_the_hub_is_enough_for_all_tokenizers(refusal, server, monkeypatch, capfd):
    huggingface_hub.close_session()
    refusal(server, monkeypatch)
    with pytest.raises(TokenizerError) as found:
        tokenizer_files.find_tokenizer(None, None, 32000)
    huggingface_hub.close_session()
    message = str(found.value)
    assert "\n" not in message
    assert message.count("cannot be reached: ") == 1
    assert len(server.requests) <= 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_model_on_a_hub_that_does_not_answer(refusal, server, monkeypatch, capfd):
    huggingface_hub.close_session()
    refusal(server, monkeypatch)
    with pytest.raises(HubUnreachableError, match=f"^{REPO} is not in the .*reached: [^\n]*$"):
        hub.model_folder(REPO)
    huggingface_hub.close_session()
    assert len(server.requests) <= 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "headers"),
    [(401, {}), (401, {"X-Error-Code": "GatedRepo"}), (403, {}), (403, {"X-Error-Code": "GatedRepo"}), (404, {}),
     (404, {"X-Error-Code": "RepoNotFound"}), (451, {})],
)  # fmt: skip
def test_after_a_repository_that_is_not_open_the_next_is_tried(code, headers, server, capfd):
    server.fault = status(code, headers)
    with pytest.raises(TokenizerError) as found:
        tokenizer_files.find_tokenizer(None, None, 32000)
    repos = [tokenizer_files.LLAMA_REPO, *tokenizer_files.PUBLIC_COPIES]
    assert all(repo in str(found.value) for repo in repos)
    assert [path for path in server.requests if "/api/models/" in path] == [f"GET /api/models/{repo}" for repo in repos]
    assert capfd.readouterr() == ("", "")


def half_of_each_file(request):
    if request.command == "HEAD" or "/resolve/" not in request.path:
        return False
    content = request.server.files[request.path.rsplit("/", 1)[-1]]
    headers = {"X-Repo-Commit": SHA, "ETag": '"x"'}
    request.say(200, content[: len(content) // 2], headers, length=len(content))
    request.connection.shutdown(socket.SHUT_RDWR)
    return True


def after_first_contact(fault):
    """The fault of a hub that answers its first request."""
    return lambda request: len(request.server.requests) > 1 and fault(request)


@pytest.mark.parametrize("fault", [half_of_each_file, status(500), status(429), status(429, {"Retry-After": "300"})])
def test_a_hub_that_fails_later_is_left_after_a_few_retries(fault, server, monkeypatch, capfd):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.fault = after_first_contact(fault)
    for ask in (lambda: hub.model_folder(REPO), lambda: hub.download_file(REPO, "tokenizer.model")):
        server.requests.clear()
        with pytest.raises(SourceError, match=f"^{REPO} [^\n]*$"):
            ask()
        assert len(server.requests) < 30
    assert "try" not in capfd.readouterr().err  # its progress bars may be there, but none of its warnings


def test_what_takes_long_is_reported_by_a_line_now_and_then(server, monkeypatch):
    monkeypatch.setattr(hub_client, "_SILENCE", 0.1)
    server.fault = lambda request: "tree" in request.path and bool(time.sleep(0.5))
    with pytest.warns(UserWarning, match=r"still waiting for 127.0.0.1:\d+ after \d+ seconds"):
        assert hub.model_folder(REPO).is_dir()


def test_the_clients_logger_is_given_back(server):
    import logging

    logger = logging.getLogger("huggingface_hub")
    before = list(logger.handlers), logger.propagate
    hub.model_folder(REPO)
    assert (logger.handlers, logger.propagate) == before


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


class TestDataSets:
    @pytest.fixture(autouse=True)
    def no_answers(self):
        hub_client._data_answer.cache_clear()

    def test_a_file_is_found_by_a_pattern_and_then_without_a_hub(self, server):
        server.files = {"test-0.jsonl": b"{}", "train.jsonl": b"[]"}
        found = hub.download_data_file(REPO, "test*")
        assert (found.name, found.revision, found.path.read_bytes()) == ("test-0.jsonl", SHA, b"{}")
        assert [request for request in server.requests if REPO in request and "/datasets/" not in request] == []
        train = hub.download_data_file(REPO, "train.jsonl")
        assert train.path.read_bytes() == b"[]"
        assert sum(f"/api/datasets/{REPO}" in request for request in server.requests) == 1  # what there is
        server.fault = status(503)
        server.requests.clear()
        assert hub.download_data_file(REPO, "test-0.jsonl", SHA) == found
        assert server.requests == []

    @pytest.mark.parametrize("refusal", REFUSALS)
    def test_a_hub_that_does_not_answer(self, refusal, server, monkeypatch, capfd):
        huggingface_hub.close_session()
        refusal(server, monkeypatch)
        with pytest.raises(HubUnreachableError, match=f"^{REPO} is not in the .*reached: [^\n]*$"):
            hub.download_data_file(REPO, "test.jsonl", SHA)
        huggingface_hub.close_session()
        assert len(server.requests) <= 1
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("name", "said"),
        [("gone.jsonl", "has no file gone.jsonl"), ("*", "has 4 files like"), ("../x", "has no file ../x")],
    )
    def test_a_name_that_leads_to_no_file(self, server, name, said):
        with pytest.raises(SourceError) as found:
            hub.download_data_file(REPO, name)
        assert said in str(found.value)

    def test_a_data_set_that_does_not_exist(self, server):
        with pytest.raises(SourceError, match=r"^me/gone is neither"):
            hub.download_data_file("me/gone", "test.jsonl")
