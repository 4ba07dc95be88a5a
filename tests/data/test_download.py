"""download.py and corpus.py with a real HTTP server on the loopback interface."""

import dataclasses
import datetime
import hashlib
import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chargpt_jax.config import DataConfig
from chargpt_jax.data import download
from chargpt_jax.data.corpus import Source, load_corpus
from chargpt_jax.data.download import Page, default_cache, fetch, keep
from chargpt_jax.data.sources import stdlib_text
from chargpt_jax.errors import UserError

STORY = "\n".join(f"CHAPTER {n}\n\nIt was day {n}, and nothing had happened yet." for n in range(1, 60))
HEADER = "The Project Gutenberg EBook of A Story\n\nTitle: A Story\n   of Days\n\nAuthor: Nobody\n\n"
START = "*** START OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\n\n"
END = "\n\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\nUpdated editions will replace the previous one.\n"
BOOK = HEADER + START + STORY + END
TEXT = {"Content-Type": "text/plain; charset=utf-8"}


# A server with answers that each test sets


@dataclass
class Answer:
    body: bytes = STORY.encode()
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: dict(TEXT))
    delay: float = 0.0
    sent: float = 1.0
    """The part of the body that is sent before the connection is closed."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[str] = []

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that close the connection, as in several tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answers = self.server.answers.get(self.path, [Answer(b"no such page", 404)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]  # the last answer is repeated
        time.sleep(answer.delay)
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[: int(len(answer.body) * answer.sent)])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(running_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "*")
    running_server.answers, running_server.asked = {}, []
    return running_server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def settings_for(source: str, **changes: Any) -> DataConfig:
    return DataConfig(source=source, **{"timeout": 2.0, "allow_stand_in": False, **changes})


def load(source: str, cache: Path, **changes: Any) -> tuple[str, tuple[Source, ...]]:
    return load_corpus(settings_for(source, **changes), cache=cache, warn=pytest.fail)


def refusal(source: str, cache: Path, **changes: Any) -> str:
    """Return the error message, after checking that it is one line and that the cache did not change."""
    before = files_in(cache)
    with pytest.raises(UserError) as caught:
        load_corpus(settings_for(source, **changes), cache=cache, warn=pytest.fail)
    assert files_in(cache) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_in(cache: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in cache.iterdir()} if cache.is_dir() else {}


# Downloads


def test_only_keep_writes_the_cache(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer()]
    url = f"{server.url}/a.txt"
    page = fetch("a", [url], settings_for(url), cache)
    assert page == Page(url, STORY.encode(), "utf-8", key="a")
    assert files_in(cache) == {}
    keep(page, cache, pytest.fail)
    today = datetime.date.today().isoformat()
    again = fetch("a", ["http://never.asked/"], settings_for(url), cache)
    assert again == Page(url, STORY.encode(), "utf-8", cached_on=today)
    assert len(server.asked) == 1


def test_a_page_is_fetched_once_and_then_comes_from_the_cache(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer()]
    text, (source,) = load(f"{server.url}/a.txt", cache)
    cached, (same,) = load(f"{server.url}/a.txt", cache)
    assert (cached, same) == (text, dataclasses.replace(source, notes=same.notes))
    assert same.notes == (f"downloaded on {datetime.date.today().isoformat()}",)
    assert server.asked == ["/a.txt"]
    assert text == STORY
    assert (source.kind, source.title, source.url) == ("url", "a.txt", f"{server.url}/a.txt")


def test_the_cache_records_the_address_and_the_hash_of_the_bytes(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer(b"\xef\xbb\xbf" + STORY.encode())]
    load(f"{server.url}/a.txt", cache)
    record_file, page_file = sorted(cache.iterdir())
    record = json.loads(record_file.read_text())
    assert record["url"] == f"{server.url}/a.txt"
    assert record["sha256"] == hashlib.sha256(page_file.read_bytes()).hexdigest()
    assert page_file.read_bytes().startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize(("encoding", "kind"), [("gzip", 31), ("deflate", 15)])
def test_a_compressed_answer_is_decompressed_but_not_an_incomplete_one(
    server: Server, cache: Path, encoding: str, kind: int
) -> None:
    packer = zlib.compressobj(wbits=kind)
    packed = packer.compress(STORY.encode()) + packer.flush()
    answers = {"/whole": packed, "/half": packed[: len(packed) // 2], "/wrong": packed[:20] + b"?" + packed[21:]}
    for path, body in answers.items():
        server.answers[path] = [Answer(body, headers={**TEXT, "Content-Encoding": encoding})]
    assert load(server.url + "/whole", cache)[0] == STORY
    for path in ("/half", "/wrong"):
        assert "the answer broke off" in refusal(server.url + path, cache)


def test_an_unknown_compression_is_refused(server: Server, cache: Path) -> None:
    server.answers["/a"] = [Answer(headers={**TEXT, "Content-Encoding": "br"})]
    assert "is compressed by 'br', which is not supported" in refusal(server.url + "/a", cache)


def test_a_password_is_not_recorded(server: Server, cache: Path) -> None:
    server.answers["/a"] = [Answer()]
    url = server.url.replace("http://", "http://bob:s3cret@")
    _, (source,) = load(url + "/a", cache)
    assert source.url == server.url + "/a"


@pytest.mark.parametrize("damage", [b"", b"other bytes", None])
@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_a_corrupted_cache_is_fetched_again(server: Server, cache: Path, suffix: str, damage: bytes | None) -> None:
    server.answers["/a.txt"] = [Answer()]
    first = load(f"{server.url}/a.txt", cache)
    whole = files_in(cache)
    [file] = cache.glob(f"*{suffix}")
    file.unlink() if damage is None else file.write_bytes(damage)
    assert load(f"{server.url}/a.txt", cache) == first
    assert len(server.asked) == 2
    assert files_in(cache) == whole


def test_a_page_cached_without_a_date_has_that_of_its_file(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer()]
    load(f"{server.url}/a.txt", cache)
    (record,) = cache.glob("*.json")
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "downloaded"}))
    os.utime(record.with_suffix(".txt"), (86_400 * 365, 86_400 * 365))
    assert load(f"{server.url}/a.txt", cache)[1][0].notes[0].startswith("downloaded on 197")


@pytest.mark.parametrize("status", [404, 410])
def test_a_text_that_a_server_does_not_have_is_the_users_mistake(server: Server, cache: Path, status: int) -> None:
    server.answers["/none.txt"] = [Answer(status=status)]
    message = refusal(f"{server.url}/none.txt", cache, allow_stand_in=True)
    assert f"does not exist (HTTP status {status})" in message
    assert server.asked == ["/none.txt"]


def test_a_status_503_is_tried_again_until_it_passes(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer(status=503), Answer(status=503), Answer()]
    assert load(f"{server.url}/a.txt", cache)[0] == STORY
    assert len(server.asked) == 3


def test_a_status_503_is_tried_no_more_than_three_times(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer(status=503)]
    assert "503" in refusal(f"{server.url}/a.txt", cache)
    assert len(server.asked) == 3


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list of all waits, in seconds; no test really waits."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: found.append(seconds) if seconds else None)
    return found


def test_the_first_retry_is_immediate_and_the_second_waits(server: Server, cache: Path, waits: list[float]) -> None:
    server.answers["/a.txt"] = [Answer(status=503)]
    refusal(f"{server.url}/a.txt", cache)
    assert waits == [2 * download.BACKOFF_SECONDS]
    waits.clear()
    server.answers["/b.txt"] = [Answer(sent=0.5)]
    refusal(f"{server.url}/b.txt", cache)
    assert waits == [2 * download.BACKOFF_SECONDS]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_respected(server: Server, cache: Path, waits: list[float], status: int) -> None:
    server.answers["/a.txt"] = [Answer(status=status, headers={**TEXT, "Retry-After": "7"}), Answer()]
    assert load(f"{server.url}/a.txt", cache)[0] == STORY
    assert waits == [7]


@pytest.mark.parametrize("asked", ["86400", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_retry_after_has_an_upper_limit(server: Server, cache: Path, waits: list[float], asked: str) -> None:
    server.answers["/a.txt"] = [Answer(status=503, headers={**TEXT, "Retry-After": asked}), Answer()]
    assert load(f"{server.url}/a.txt", cache)[0] == STORY
    assert waits == [download.MAX_RETRY_AFTER]


@pytest.mark.parametrize("asked", ["soon", "-1", "9" * 5000, "Fri, 99 Foo 10000000000 00:00:00 GMT"])
def test_an_invalid_retry_after_is_ignored(server: Server, cache: Path, waits: list[float], asked: str) -> None:
    server.answers["/a.txt"] = [Answer(status=503, headers={**TEXT, "Retry-After": asked}), Answer()]
    assert load(f"{server.url}/a.txt", cache)[0] == STORY
    assert waits == []


def test_truncated_bodies_and_statuses_share_one_limit(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer(status=503), Answer(sent=0.5), Answer(status=500), Answer()]
    assert "500" in refusal(f"{server.url}/a.txt", cache)
    assert len(server.asked) == 3


def test_silent_server_is_an_error_after_three_timeouts(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer(delay=0.5)]
    assert "no answer within 0.1 s" in refusal(f"{server.url}/a.txt", cache, timeout=0.1)
    assert len(server.asked) == 3


def test_half_a_body_is_tried_again_and_then_refused(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer(sent=0.5)]
    assert "broke off" in refusal(f"{server.url}/a.txt", cache)
    assert len(server.asked) == 3


def test_half_a_body_is_rejected_also_if_urllib3_accepts_it(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lenient = property(lambda self: False, lambda self, value: None)  # the default of urllib3 1
    monkeypatch.setattr("urllib3.response.HTTPResponse.enforce_content_length", lenient, raising=False)
    server.answers["/a.txt"] = [Answer(sent=0.5)]
    assert "broke off" in refusal(f"{server.url}/a.txt", cache)


def test_half_a_body_does_not_stop_a_whole_one_after_it(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer(sent=0.5), Answer()]
    assert load(f"{server.url}/a.txt", cache)[0] == STORY


@pytest.mark.parametrize(
    ("path", "kind", "accepted"),
    [
        ("/a.txt", "text/html; charset=utf-8", False),
        ("/a.txt", "application/pdf", False),
        ("/a.txt", "image/png", False),
        ("/a.bin", "application/octet-stream", False),
        ("/a.txt", "application/octet-stream", True),
        ("/a.md", "text/markdown", True),
        ("/a", "", True),
    ],
)
def test_only_plain_text_is_accepted(server: Server, cache: Path, path: str, kind: str, accepted: bool) -> None:
    server.answers[path] = [Answer(headers={"Content-Type": kind})]
    if accepted:
        assert load(f"{server.url}{path}", cache)[0] == STORY
    else:  # no stand-in, because the server answered
        message = refusal(f"{server.url}{path}", cache, allow_stand_in=True)
        assert "must be plain text" in message
        assert kind.partition(";")[0] in message
    assert len(server.asked) == 1


def test_a_redirect_is_followed(server: Server, cache: Path) -> None:
    server.answers = {"/old": [Answer(b"", 302, {"Location": "/new.txt"})], "/new.txt": [Answer()]}
    assert load(f"{server.url}/old", cache)[0] == STORY
    assert server.asked == ["/old", "/new.txt"]


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/a.txt"])
def test_a_redirect_away_from_http_is_refused(server: Server, cache: Path, target: str) -> None:
    server.answers["/old"] = [Answer(b"", 302, {"Location": target})]
    assert "leads to an unsupported URL" in refusal(f"{server.url}/old", cache, allow_stand_in=True)


def test_endless_redirect_is_an_error(server: Server, cache: Path) -> None:
    server.answers["/old"] = [Answer(b"", 302, {"Location": "/old"})]
    assert "too many redirects" in refusal(f"{server.url}/old", cache)


def test_a_length_of_thousands_of_digits_is_too_large(server: Server, cache: Path) -> None:
    server.answers["/a.txt"] = [Answer(headers={**TEXT, "Content-Length": "9" * 5_000})]
    assert "is larger than data.max_megabytes" in refusal(f"{server.url}/a.txt", cache)


@pytest.mark.parametrize("length", ["many", "-1", "1.5", "²", "0x10"])
def test_a_length_that_is_no_number_is_ignored(server: Server, cache: Path, length: str) -> None:
    server.answers["/a.txt"] = [Answer(headers={**TEXT, "Content-Length": length})]
    assert load(f"{server.url}/a.txt", cache)[0] == STORY


@pytest.mark.parametrize("length", [{}, {"Content-Length": ""}])
def test_a_page_above_the_cap_is_refused(server: Server, cache: Path, length: dict[str, str]) -> None:
    server.answers["/a.txt"] = [Answer(b"a" * 200_000, headers=TEXT | length)]
    message = refusal(f"{server.url}/a.txt", cache, max_megabytes=0.1, allow_stand_in=True)
    assert "data.max_megabytes (0.1)" in message
    assert load(f"{server.url}/a.txt", cache, max_megabytes=0.2)[0] == "a" * 200_000


def test_declared_charset_is_used_also_from_the_cache(server: Server, cache: Path) -> None:
    body = "café crème".encode("latin-1")
    server.answers["/a.txt"] = [Answer(body, headers={"Content-Type": 'text/plain; charset="ISO-8859-1"'})]
    assert [load(f"{server.url}/a.txt", cache)[0] for _ in range(2)] == ["café crème"] * 2
    assert len(server.asked) == 1


@pytest.mark.parametrize("declared", ["utf-8", "klingon", ""])
def test_a_page_in_another_charset_than_declared_is_refused(server: Server, cache: Path, declared: str) -> None:
    headers = {"Content-Type": f"text/plain; charset={declared}" if declared else "text/plain"}
    server.answers["/a.txt"] = [Answer("café crème".encode("latin-1"), headers=headers)]
    message = refusal(f"{server.url}/a.txt", cache, allow_stand_in=True)
    assert f"{server.url}/a.txt" in message
    assert ("klingon" if declared == "klingon" else "at byte 3") in message


def test_unwritable_cache_is_a_warning(server: Server, tmp_path: Path) -> None:
    server.answers["/a.txt"] = [Answer()]
    (tmp_path / "cache").write_text("a file, not a folder")
    lines: list[str] = []
    text, _ = load_corpus(settings_for(f"{server.url}/a.txt"), cache=tmp_path / "cache", warn=lines.append)
    assert text == STORY
    assert len(lines) == 1
    assert "Cannot cache" in lines[0]


def test_a_write_that_fails_leaves_no_temporary_file(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    server.answers["/a.txt"] = [Answer()]
    monkeypatch.setattr("os.replace", full)
    lines: list[str] = []
    load_corpus(settings_for(f"{server.url}/a.txt"), cache=cache, warn=lines.append)
    assert files_in(cache) == {}
    assert "No space left" in lines[0]


# Gutenberg numbers and addresses


def test_each_mirror_is_tried_for_a_number(server: Server, cache: Path) -> None:
    server.answers = {
        "/one/60": [Answer(b"<html>", headers={"Content-Type": "text/html"})],
        "/three/60.txt": [Answer(BOOK.encode())],
    }
    mirrors = tuple(server.url + path for path in ("/one/{number}", "/two/{number}", "/three/{number}.txt"))
    text, (source,) = load("60", cache, mirrors=mirrors)
    assert text == STORY
    assert server.asked == ["/one/60", "/two/60", "/three/60.txt"]
    assert (source.kind, source.title, source.url) == ("gutenberg", "A Story of Days", f"{server.url}/three/60.txt")
    assert load("060", cache, mirrors=mirrors)[0] == STORY
    assert len(server.asked) == 3


def test_a_number_needs_a_marker(server: Server, cache: Path) -> None:
    server.answers["/60"] = [Answer(STORY.encode()), Answer((HEADER + START + STORY).encode())]
    mirrors = (server.url + "/{number}",)
    message = refusal("60", cache, mirrors=mirrors, allow_stand_in=True)
    assert "no Gutenberg start or end marker" in message
    assert load("60", cache, mirrors=mirrors)[0] == STORY


@pytest.mark.parametrize("host", ["www.gutenberg.org", "gutenberg.org"])
def test_an_address_at_gutenberg_org_needs_a_marker(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    here = socket.getaddrinfo("127.0.0.1", server.server_port, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: here)
    server.answers = {"/a.txt": [Answer(STORY.encode())], "/b.txt": [Answer(BOOK.encode())]}
    address = f"http://{host}:{server.server_port}"
    assert "no Gutenberg start or end marker" in refusal(f"{address}/a.txt", cache)
    text, (source,) = load(f"{address}/b.txt", cache)
    assert (text, source.kind) == (STORY, "gutenberg")
    other = f"http://notgutenberg.org:{server.server_port}/a.txt"
    assert load(other, cache)[1][0].kind == "url"


# The stand-in


def test_failed_download_uses_the_stand_in_with_one_warning(server: Server, cache: Path) -> None:
    lines: list[str] = []
    server.answers["/60"] = [Answer(status=403)]
    config = settings_for("60", mirrors=(server.url + "/{number}",), allow_stand_in=True, start_at="^CHAPTER")
    text, (source,) = load_corpus(config, cache=cache, warn=lines.append)
    assert text == stdlib_text()
    assert (source.kind, source.stand_in_for, source.url) == ("stdlib", "60", "python:pydoc_data.topics")
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert all(word in lines[0] for word in ("60", "403", "STAND-IN", "Python help topics"))
    assert files_in(cache) == {}


def test_the_stand_in_is_not_used_without_permission(server: Server, cache: Path) -> None:
    server.answers["/60"] = [Answer(status=403)]
    message = refusal("60", cache, mirrors=(server.url + "/{number}",))
    assert all(word in message for word in ("60", "403", "data.allow_stand_in"))


def test_stand_in_is_used_once_for_all_missing_sources(server: Server, cache: Path, tmp_path: Path) -> None:
    server.answers = {"/60": [Answer(status=403)], "/61": [Answer(status=403)]}
    mirrors, lines = (server.url + "/{number}",), list[str]()
    config = settings_for("60,61,stdlib", mirrors=mirrors, allow_stand_in=True)
    text, sources = load_corpus(config, cache=cache, warn=lines.append)
    assert text == stdlib_text()
    assert [source.stand_in_for for source in sources] == ["60, 61"]
    assert len(lines) == 1


def test_no_stand_in_beside_texts_that_were_found(server: Server, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("here")
    server.answers["/60"] = [Answer(status=403)]
    message = refusal(f"{tmp_path}/a.txt,60", cache, mirrors=(server.url + "/{number}",), allow_stand_in=True)
    assert "beside texts that were found" in message
    assert "60" in message


def test_offline_machine_tries_each_host_once(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def no_such_name(host: str, *_: Any, **__: Any) -> None:
        names.append(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 60.0)
    lines: list[str] = []
    _, (source,) = load_corpus(DataConfig(source="60"), cache=cache, warn=lines.append)
    assert source.stand_in_for == "60"
    assert names == ["www.gutenberg.org", "gutenberg.pglaf.org"]
    assert "its name cannot be resolved" in lines[0]


def test_a_refused_connection_is_not_waited_for(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(download, "BACKOFF_SECONDS", 60.0)
        message = refusal(f"http://127.0.0.1:{taken.getsockname()[1]}/a.txt", cache)
    assert "no connection can be made" in message


def test_several_sources_are_joined_as_they_are_named(server: Server, cache: Path, tmp_path: Path) -> None:
    server.answers["/a.txt"] = [Answer(b"web")]
    (tmp_path / "a.txt").write_text("file")
    text, sources = load(f" {server.url}/a.txt , {tmp_path}/a.txt,", cache)
    assert text == "web\nfile"
    assert [source.kind for source in sources] == ["url", "file"]
    assert [source.characters for source in sources] == [3, 4]


# The download cache


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"CHARGPT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"CHARGPT_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/chargpt_jax"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/chargpt_jax"),
        ({"HOME": "/c"}, "/c/.cache/chargpt_jax"),
    ],
)
def test_cache_folder_depends_on_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
) -> None:
    monkeypatch.delenv("CHARGPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_cache() == Path(folder)


def test_download_is_cached_in_the_default_folder(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHARGPT_CACHE", str(cache))
    server.answers["/a.txt"] = [Answer()]
    load_corpus(settings_for(f"{server.url}/a.txt"))
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".txt"]
