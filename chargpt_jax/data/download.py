"""Download a text, and cache it on disk.

A request is tried up to TRIES times, with a timeout and a size limit; the answer must be plain text. `fetch` does not
write the cache: the caller checks the page first, then calls `keep`. `corpus.py` interprets the page.
"""

import datetime
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from chargpt_jax import atomic
from chargpt_jax.config import DataConfig
from chargpt_jax.errors import UserError

if TYPE_CHECKING:
    import requests
    import urllib3

TRIES = 3
"""Requests for one URL, if they fail in a way that may be temporary."""

RETRY_STATUSES = frozenset({408, 429, *range(500, 600)})
"""HTTP status codes that may be temporary."""

GONE_STATUSES = frozenset({404, 410})
"""HTTP status codes of a server that answers, but has no such text."""

BACKOFF_SECONDS = 1.0
"""urllib3's backoff factor: the first retry is immediate, the second waits twice this time."""

MAX_RETRY_AFTER = 30.0
"""Maximum wait in seconds, whatever a server asks for in its Retry-After header."""

CONNECT_SECONDS = 3.0
"""Maximum wait for a connection: an offline machine should soon use the stand-in text."""

BLOCK = 1 << 20
"""Bytes of a text that are read together."""


@dataclass(frozen=True)
class Page:
    """A text as it was downloaded or read."""

    url: str
    """The URL that answered, or the path of a local file."""
    data: bytes
    charset: str | None = None
    """The charset that the server declared."""
    key: str | None = None
    """Its name in the cache, if it is not cached yet."""
    cached_on: str | None = None
    """The date of the download, if it comes from the cache."""
    path: Path | None = None
    """The local file, if it is large: then `data` is empty."""

    def size(self) -> int:
        """Return the number of bytes."""
        return len(self.data) if self.path is None else self.path.stat().st_size

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes of the text, in blocks of at most `BLOCK`."""
        if self.path is None:
            yield from (self.data[start : start + BLOCK] for start in range(0, len(self.data), BLOCK))
            return
        with self.path.open("rb") as file:
            yield from iter(lambda: file.read(BLOCK), b"")

    def content(self) -> bytes:
        """Return all bytes of the text."""
        return b"".join(self.blocks())


class DownloadError(Exception):
    """A text could not be downloaded; `unreachable`: no connection to its host is possible."""

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


def default_cache() -> Path:
    """Return the download cache: $CHARGPT_CACHE, or chargpt_jax in the user's cache folder."""
    if folder := os.environ.get("CHARGPT_CACHE"):
        return Path(folder).expanduser()
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")  # by its specification a relative path is ignored
    return (given if given.is_absolute() else Path.home() / ".cache") / "chargpt_jax"


def fetch(key: str, urls: Sequence[str], config: DataConfig, cache: Path) -> Page:
    """Return the cached page of a key, or the page of the first URL that answers with a text.

    A downloaded page is not cached yet: check it first, then call `keep`.

    Raises:
        UserError: if no URL gives a text, and one answered with something else.
        DownloadError: if no URL answered.
    """
    if page := _cached(cache, key):
        return page
    failures: list[str] = []
    refusal: UserError | None = None
    unreachable: set[str] = set()
    for url in urls:
        host = split_url(url).netloc.rpartition("@")[2]
        if host in unreachable:
            continue
        try:
            return Page(url, *_get(url, config), key)
        except UserError as error:
            refusal = refusal or error
        except DownloadError as error:
            failures.append(f"{host}: {error}")
            if error.unreachable:
                unreachable.add(host)
    raise refusal or DownloadError(", ".join(dict.fromkeys(failures)) or "data.mirrors is empty")


def keep(page: Page, cache: Path, warn: Callable[[str], None]) -> None:
    """Cache a page, with a record of its URL, sha256 and charset; if that fails, only warn."""
    record = {"url": page.url, "sha256": hashlib.sha256(page.data).hexdigest(), "charset": page.charset}
    record["downloaded"] = datetime.date.today().isoformat()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        atomic.sweep(cache, atomic.OLD_SECONDS)
        atomic.write_file(cache / f"{page.key}.txt", page.data)
        atomic.write_file(cache / f"{page.key}.json", json.dumps(record, indent=2).encode())
    except OSError as error:
        warn(f"WARNING: Cannot cache {page.url} in {cache} ({error.strerror}): it will be downloaded again.")


def split_url(url: str) -> SplitResult:
    """Split a URL into its parts.

    Raises:
        UserError: if it is not an http or https URL.
    """
    with suppress(ValueError):
        url.encode()  # a lone surrogate is not valid in a URL
        if (parts := urlsplit(url)).scheme in ("http", "https") and parts.hostname:
            return parts
    raise UserError(f"{url} is not an http or https URL: correct it, or give a file.")


# HTTP requests and the layout of the cache: skip these on first reading


def _get(url: str, config: DataConfig) -> tuple[bytes, str | None]:
    """Return the bytes of a page and its declared charset, with at most TRIES requests.

    urllib3 retries a request until its headers are complete. A body that breaks off is retried here, and counts
    against the same limit.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError

    timeout = (min(CONNECT_SECONDS, config.timeout), config.timeout)
    headers = {"User-Agent": "chargpt_jax", "Accept-Encoding": "identity"}
    retries = _retries()
    try:
        while True:
            with requests.Session() as session:
                for scheme in ("http://", "https://"):
                    session.mount(scheme, HTTPAdapter(max_retries=retries))
                with session.get(url, stream=True, timeout=timeout, headers=headers) as response:
                    if (code := response.status_code) in GONE_STATUSES:
                        raise UserError(f"{url} does not exist (HTTP status {code}): correct it, or give a file.")
                    if code != 200:
                        raise DownloadError(f"HTTP status {code}")
                    charset = _charset(url, response)
                    try:
                        return _body(url, response, config.max_megabytes), charset
                    except HTTPError as error:
                        cut = ProtocolError(str(error))
                        retries = (response.raw.retries or retries).increment("GET", url, error=cut)
            retries.sleep()
    except MaxRetryError as error:
        timed_out = "timed out" in str(error.reason)
        raise DownloadError(f"no answer within {config.timeout:g} s" if timed_out else "the answer broke off") from None
    except requests.exceptions.RequestException as error:
        raise _failure(url, error, config.timeout) from None


def _retries() -> "urllib3.Retry":
    """Return the rule for retries: connections are not retried, so that an offline machine does not wait."""
    import urllib3
    from urllib3.exceptions import InvalidHeader

    class BoundedRetry(urllib3.Retry):
        """Waits as long as the server asks for, but at most MAX_RETRY_AFTER; ignores an invalid Retry-After."""

        def get_retry_after(self, response: "urllib3.BaseHTTPResponse") -> float | None:
            try:
                seconds = super().get_retry_after(response)
            except (InvalidHeader, ValueError, OverflowError):
                return None
            return None if seconds is None else min(seconds, MAX_RETRY_AFTER)

    return BoundedRetry(
        total=TRIES - 1,
        connect=0,
        other=0,
        status_forcelist=RETRY_STATUSES,
        backoff_factor=BACKOFF_SECONDS,
        raise_on_status=False,
    )


def _charset(url: str, response: "requests.Response") -> str | None:
    """Return the charset that the server declares.

    Raises:
        UserError: if the answer is not plain text.
    """
    message = Message()
    message["Content-Type"] = response.headers.get("Content-Type") or "text/plain"
    kind = message.get_content_type()
    bare = kind == "application/octet-stream" and any(
        urlsplit(name).path.lower().endswith(".txt") for name in (url, response.url)
    )
    if kind == "text/html" or not (kind.startswith("text/") or bare):
        raise UserError(f"{url} has the type {kind}, but must be plain text: give the URL of a text.")
    return message.get_content_charset()


def _body(url: str, response: "requests.Response", max_megabytes: float) -> bytes:
    """Read the body, at most `max_megabytes` and exactly as long as announced (urllib3 1 accepts a truncated one).

    Raises:
        UserError: if it is larger, or compressed in an unknown way.
        urllib3.exceptions.HTTPError: if it breaks off.
    """
    from urllib3.exceptions import ProtocolError

    declared = response.headers.get("Content-Length", "")
    # Python refuses to convert thousands of digits; so many bytes are above every limit.
    length = int(declared[:18]) if declared.isascii() and declared.isdecimal() else None
    limit = max_megabytes * 1e6
    data = bytearray()
    if (length or 0) <= limit:
        for chunk in _decompressed(url, response.raw.stream(65_536, decode_content=False), response.headers):
            data += chunk
            if len(data) > limit:
                break
    if max(length or 0, len(data)) > limit:
        raise UserError(
            f"{url} is larger than data.max_megabytes ({max_megabytes:g}): increase it, or give a smaller text."
        )
    if length is not None and response.raw.tell() != length:
        raise ProtocolError("the answer broke off")
    return bytes(data)


def _decompressed(url: str, chunks: Iterable[bytes], headers: Mapping[str, str]) -> Iterator[bytes]:
    """Decompress a body, which some servers compress without being asked; neither library notices a truncated one.

    Raises:
        UserError: if it is compressed in an unknown way.
        urllib3.exceptions.DecodeError: if it is damaged or incomplete.
    """
    from urllib3.exceptions import DecodeError

    encoding = (headers.get("Content-Encoding") or "identity").strip().lower()
    if encoding == "identity":
        yield from chunks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UserError(
            f"{url} is compressed by {encoding[:40]!a}, which is not supported: give another URL or a file."
        )
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # finds the format in the first bytes
    try:
        for chunk in chunks:
            while chunk:
                yield decoder.decompress(chunk, 65_536)
                chunk = decoder.unconsumed_tail
    except zlib.error as error:
        raise DecodeError(str(error)) from None
    if not decoder.eof:
        raise DecodeError("the compressed answer is incomplete")


def _failure(url: str, error: "requests.exceptions.RequestException", timeout: float) -> Exception:
    """Convert an exception of `requests`, whose retries are used up, to one of chargpt_jax."""
    from requests import exceptions
    from urllib3.exceptions import NewConnectionError

    unsupported = (exceptions.InvalidURL, exceptions.InvalidSchema, exceptions.MissingSchema)
    if isinstance(error, unsupported):  # also after a redirect
        return UserError(f"{url} leads to an unsupported URL ({error}): give another.")
    cause = getattr(error.args[0], "reason", None) if error.args else None
    if type(cause).__name__ == "NameResolutionError":  # urllib3 1 does not define it
        return DownloadError("its name cannot be resolved", unreachable=True)
    lasting = (exceptions.ConnectTimeout, exceptions.ProxyError, exceptions.SSLError)
    if isinstance(error, lasting) or isinstance(cause, NewConnectionError):
        return DownloadError("no connection can be made", unreachable=True)
    if isinstance(error, exceptions.Timeout) or "timed out" in str(error):
        return DownloadError(f"no answer within {timeout:g} s")
    if isinstance(error, exceptions.TooManyRedirects):
        return DownloadError("too many redirects")
    return DownloadError("the answer broke off")


def _cached(cache: Path, key: str) -> Page | None:
    """Return a cached page; None if it is missing, or its bytes differ from its record."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((cache / f"{key}.json").read_text("utf-8"))
        data = (cache / f"{key}.txt").read_bytes()
        if hashlib.sha256(data).hexdigest() == record["sha256"]:
            downloaded = record.get("downloaded") or _date_of(cache / f"{key}.txt")
            return Page(record["url"], data, record["charset"], cached_on=str(downloaded))
    return None


def _date_of(path: Path) -> str:
    return datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
