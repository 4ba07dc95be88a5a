"""Fetch a text from the web, and keep it in a cache.

An address is asked up to three times, with a timeout and a size cap; what it answers must be plain text. `fetch` never
writes: a caller looks at the page first and then gives it to `keep`. What a page means is left to `corpus.py`.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from chargpt_jax import atomic
from chargpt_jax.config import DataConfig
from chargpt_jax.errors import UserError

TRIES = 3
"""Times that one address is asked while it fails in a way that may pass."""

BACKOFF_SECONDS = 1.0
"""Wait before the second try; it doubles with each further one."""

CONNECT_SECONDS = 3.0
"""Longest wait for a connection: an offline machine should reach the stand-in quickly."""


@dataclass(frozen=True)
class Page:
    """A text as it was found."""

    url: str
    """The address that answered, or the path of a local file."""
    data: bytes
    charset: str | None = None
    """As the answer declares it."""
    key: str | None = None
    """Its name in the cache, where it is not there yet."""


class DownloadError(Exception):
    """A text could not be fetched. `again`: this may pass; `unreachable`: there is no connection to its host."""

    def __init__(self, reason: str, again: bool = False, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.again, self.unreachable = again, unreachable


def default_cache() -> Path:
    """Return the folder where downloads are kept: $CHARGPT_CACHE, or chargpt_jax in the user's cache folder."""
    if folder := os.environ.get("CHARGPT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chargpt_jax"


def fetch(key: str, urls: Sequence[str], config: DataConfig, cache: Path) -> Page:
    """Return the page that the cache holds under a key, or else that of the first address that answers with a text.

    A page from the web is not kept yet: look at it first, then call `keep`.

    Raises:
        UserError: where none does and one answered with something else.
        DownloadError: where none answered.
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
            return Page(url, *_get_patiently(url, config), key)
        except UserError as error:
            refusal = refusal or error
        except DownloadError as error:
            failures.append(f"{host}: {error}")
            if error.unreachable:
                unreachable.add(host)
    raise refusal or DownloadError(", ".join(dict.fromkeys(failures)) or "data.mirrors is empty")


def keep(page: Page, cache: Path, warn: Callable[[str], None]) -> None:
    """Keep a page in the cache, with the record that `_cached` checks it by."""
    record = {"url": page.url, "sha256": hashlib.sha256(page.data).hexdigest(), "charset": page.charset}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        atomic.write_file(cache / f"{page.key}.txt", page.data, shared=True)
        atomic.write_file(cache / f"{page.key}.json", json.dumps(record, indent=2).encode(), shared=True)
    except OSError as error:
        warn(f"WARNING: {page.url} cannot be kept in {cache} ({error.strerror}) and will be downloaded again.")


def split_url(url: str) -> SplitResult:
    """Take an address apart; refuse what is not http or https."""
    with suppress(ValueError):
        url.encode()  # half a character is none of an address
        if (parts := urlsplit(url)).scheme in ("http", "https") and parts.hostname:
            return parts
    raise UserError(f"{url} is not an http or https address, but only these are fetched: correct it, or give a file.")


# How an address is asked, and how the cache is laid out: skip these on first reading


def _get_patiently(url: str, config: DataConfig) -> tuple[bytes, str | None]:
    for attempt in range(TRIES - 1):
        try:
            return _get(url, config)
        except DownloadError as error:
            if not error.again:
                raise
        time.sleep(BACKOFF_SECONDS * 2**attempt)
    return _get(url, config)


def _get(url: str, config: DataConfig) -> tuple[bytes, str | None]:
    """Ask once. Returns the bytes and the charset that the answer declares."""
    import requests

    timeout = (min(CONNECT_SECONDS, config.timeout), config.timeout)
    headers = {"User-Agent": "chargpt_jax", "Accept-Encoding": "identity"}
    try:
        with requests.get(url, stream=True, timeout=timeout, headers=headers) as response:
            if (code := response.status_code) != 200:
                raise DownloadError(f"HTTP status {code}", again=code >= 500 or code in (408, 429))
            charset = _charset(url, response)
            return _body(url, response, config.max_megabytes), charset
    except requests.exceptions.RequestException as error:
        raise _failure(url, error, config.timeout) from None


def _charset(url: str, response: Any) -> str | None:
    """Return the charset that the answer declares; refuse what is not a plain text."""
    message = Message()
    message["Content-Type"] = response.headers.get("Content-Type") or "text/plain"
    kind = message.get_content_type()
    bare = kind == "application/octet-stream" and any(
        urlsplit(name).path.lower().endswith(".txt") for name in (url, response.url)
    )
    if kind == "text/html" or not (kind.startswith("text/") or bare):
        raise UserError(f"{url} has the wrong type, {kind}, but a plain text is needed: give the address of one.")
    return message.get_content_charset()


def _body(url: str, response: Any, max_megabytes: float) -> bytes:
    """Read no more than the cap, and no less than was announced (older urllib3 takes half an answer for a whole)."""
    declared = response.headers.get("Content-Length", "")
    length = int(declared) if declared.isdecimal() else None
    most = max_megabytes * 1e6
    data = bytearray()
    if (length or 0) <= most:
        for chunk in response.iter_content(65_536):
            data += chunk
            if len(data) > most:
                break
    if max(length or 0, len(data)) > most:
        raise UserError(
            f"{url} is larger than data.max_megabytes ({max_megabytes:g}): raise that, or give a smaller text."
        )
    if length is not None and response.raw.tell() != length:
        raise DownloadError("the answer broke off", again=True)
    return bytes(data)


def _failure(url: str, error: Any, timeout: float) -> Exception:
    """Say shortly what a `requests` exception means, and whether it may pass."""
    from requests import exceptions
    from urllib3.exceptions import NewConnectionError

    if isinstance(error, ValueError):  # InvalidURL, and InvalidSchema after a redirect
        return UserError(f"{url} leads to an address that cannot be fetched ({error}): give another.")
    cause = getattr(error.args[0], "reason", None) if error.args else None
    if type(cause).__name__ == "NameResolutionError":  # urllib3 1 has no such class
        return DownloadError("its name cannot be resolved", unreachable=True)
    lasting = (exceptions.ConnectTimeout, exceptions.ProxyError, exceptions.SSLError)
    if isinstance(error, lasting) or isinstance(cause, NewConnectionError):
        return DownloadError("no connection can be made", unreachable=True)
    if isinstance(error, exceptions.Timeout) or "timed out" in str(error):
        return DownloadError(f"no answer within {timeout:g} s", again=True)
    if isinstance(error, exceptions.TooManyRedirects):
        return DownloadError("too many redirects")
    return DownloadError("the answer broke off", again=True)


def _cached(cache: Path, key: str) -> Page | None:
    """Return a kept page, unless its bytes are not those that its record speaks of."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((cache / f"{key}.json").read_text("utf-8"))
        data = (cache / f"{key}.txt").read_bytes()
        if hashlib.sha256(data).hexdigest() == record["sha256"]:
            return Page(record["url"], data, record["charset"])
    return None
