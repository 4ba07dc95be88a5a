"""The texts that a preparation has finished, so that an interrupted one continues after the last of them.

`preparing/text` holds the finished texts one after another. Each has a line in `preparing/finished.jsonl`: what it was
made from, its length and its source. The line is written after the text, and the sha256 of the text is checked before
it is used, so a text that was written in part is made again. Both files are removed at the end of a preparation.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from chargpt_jax import atomic
from chargpt_jax.config import DataConfig
from chargpt_jax.data.download import Page
from chargpt_jax.data.streams.text_file import TextFile
from chargpt_jax.errors import UserError

FOLDER, TEXT, LINES = "preparing", "text", "finished.jsonl"
"""The names of the folder, in the run's folder, and of its files."""

FORMAT = 1
"""Changed with the code that repairs texts and removes licences: texts of other versions are made again."""


class Journal:
    """The finished texts of one preparation; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None, config: DataConfig) -> None:
        """Read which texts an interrupted preparation in this folder has finished.

        Raises:
            UserError: if the folder has a file or a link of the same name.
        """
        self._config, self._folder = config, folder / FOLDER if folder is not None else None
        self._left, self._records = list[dict[str, Any]](), list[dict[str, Any]]()
        self._rewritten = False
        if self._folder is None or config.unit == "byte":  # bytes are copied as they are
            self._folder, self.text = None, TextFile(folder)
            return
        if self._folder.is_symlink() or (self._folder.exists() and not self._folder.is_dir()):
            raise UserError(f"{self._folder} must be a folder, but is something else: remove it.")
        self._folder.mkdir(exist_ok=True)
        self._left, self.text = _lines(self._folder / LINES), TextFile(folder, self._folder / TEXT)

    def key_of(self, kind: str, page: Page) -> str:
        """Return a hash of what the finished text of a page depends on."""
        if page.path is None:
            content = hashlib.sha256(page.data).hexdigest()
        else:
            status = page.path.stat()
            content = f"{page.path.resolve()} {status.st_size} {status.st_mtime_ns}"
        config = [self._config.repair, self._config.encoding, self._config.start_at]
        about = [FORMAT, importlib.metadata.version("ftfy"), kind, page.url, page.charset, content, config]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def kept(self, key: str) -> dict[str, Any] | None:
        """Return the record of the next finished text if it was made from this key; if not, forget all that are left.

        The caller checks the text, and then calls `use` or `forget`.
        """
        if self._left and self._left[0]["key"] == key:
            return self._left[0]
        self.forget()
        return None

    def use(self) -> None:
        """Record that the next finished text is used."""
        self._records.append(self._left.pop(0))

    def forget(self) -> None:
        """Forget the finished texts that are left: what follows is written over them."""
        self._left = []

    def add(self, key: str, size: int, source: Any) -> None:
        """Record that a text, of this size in UTF-8, is finished."""
        if self._folder is None:
            return
        self.text.flush()
        self._records.append({"key": key, "bytes": size, "source": dataclasses.asdict(source)})
        if self._rewritten:
            with open(self._folder / LINES, "a", encoding="utf-8", opener=atomic.regular_only) as file:
                file.write(json.dumps(self._records[-1]) + "\n")
        else:  # the old file may have lines of texts that are gone, and a truncated last one
            lines = "".join(json.dumps(record) + "\n" for record in self._records)
            atomic.write_file(self._folder / LINES, lines.encode())
            self._rewritten = True

    def interrupt(self) -> None:
        """Remove the files if no text is finished: there is nothing to continue."""
        if not self._records and not self._left:
            self.remove()

    def remove(self) -> None:
        """Remove the files: the corpus is complete, or its config or text is invalid."""
        if self._folder is not None:
            for name in (TEXT, LINES):
                with contextlib.suppress(OSError):
                    os.unlink(self._folder / name)
            with contextlib.suppress(OSError):
                self._folder.rmdir()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file up to the first line that is invalid: the last one may be truncated."""
    found: list[dict[str, Any]] = []
    with (
        contextlib.suppress(OSError, ValueError, TypeError, AttributeError),
        open(path, encoding="utf-8", opener=atomic.regular_only) as file,
    ):
        for line in file:
            record = json.loads(line)
            if not {"key", "bytes", "source"} <= record.keys() or type(record["bytes"]) is not int:
                break
            found.append(record)
    return found
