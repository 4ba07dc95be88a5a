"""Texts of a corpus: the pieces in which they are read do not matter, and bytes stay as they are."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chargpt_jax.config import DataConfig
from chargpt_jax.config.files import load_config
from chargpt_jax.data import download, gutenberg, sources
from chargpt_jax.data.batches import sizes
from chargpt_jax.data.corpus import Corpus, load_corpus, read_corpus
from chargpt_jax.data.repair import may_be_bad
from chargpt_jax.data.streams import licences, text_file
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError

STORY = "".join(f"It was day {n},\r\nand nothing “had” happened—so.\r\n\r\n" for n in range(60))
START, END = (
    "*** START OF THIS PROJECT GUTENBERG EBOOK A ***\r\n\r\n",
    "*** END OF THIS PROJECT GUTENBERG EBOOK A ***\r\n",
)
LICENCE = "Updated editions will replace the previous one.\r\n\r\n"
PARTS = st.sampled_from(
    [
        *(STORY, STORY, START, END, LICENCE, "Produced by Nobody\n\n", "[Transcriber's\n note: none]\n\n", "\n\n\n"),
        *("e\u0301", "\u0301x\n", "“q”", "&amp;", "<b>", "\x85", "\u2028", "ﬁ", "кот", "日本 ", "\r", "\r\n", " \t"),
        *("Ã©", "â€œ", "Â ", "œ\n"),
    ]
)


def corpus(source: str | Path, **changes: Any) -> Corpus:
    return read_corpus(DataConfig(source=str(source), **changes), warn=pytest.fail)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(PARTS, min_size=1, max_size=12), repair=st.sampled_from(["auto", "auto", "all", "none", "quotes"])
)
def test_corpus_does_not_depend_on_the_size_of_pieces(tmp_path, parts, repair):
    path, config = tmp_path / "a.txt", DataConfig(source=str(tmp_path / "a.txt"), repair=repair)
    path.write_bytes("".join(["a b\n", *parts]).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gutenberg, "MAX_HEAD", 2_000)
        results = []
        for size in (1 << 20, 8_192):
            for module in (download, sources):
                patch.setattr(module, "BLOCK", size)
            patch.setattr(text_file, "PIECE", size // 4)
            patch.setattr(licences, "AROUND", size // 4)
            try:
                results.append(load_corpus(config, warn=pytest.fail))
            except UserError as error:
                results.append(str(error))
    if "\u2028" in parts or "\x85" in parts:  # repairs that add lines shift the lines that are compared
        assert results[0][0] == results[1][0]
    else:
        assert results[0] == results[1]


@pytest.mark.parametrize("repair", ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all", "none"))])
def test_corpus_of_a_large_text_needs_memory_for_some_pieces(tmp_path, monkeypatch, repair):
    path = tmp_path / "a.txt"
    path.write_text("It was “day” one, and nothing had happened.\n" * 150_000)
    for module in (download, sources):
        monkeypatch.setattr(module, "BLOCK", 1 << 16)
    monkeypatch.setattr(text_file, "PIECE", 1 << 16)
    may_be_bad("“")  # ftfy compiles its patterns once
    config = DataConfig(source=str(path), repair=repair)
    tracemalloc.start()
    try:
        found = read_corpus(config, warn=pytest.fail)
        tokenizer = CharTokenizer(found.characters)
        count = sum(len(ids) for ids in found.ids(tokenizer))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == len(found.text) == 6_600_000
    assert peak < 4e6


@pytest.mark.parametrize(
    "content",
    [bytes(range(256)), b"\xef\xbb\xbfa\r\nb\0" * 700_000, (START + STORY + END + LICENCE).encode(), b" \n", b"%PDF-1"],
)
def test_bytes_of_any_file_stay_as_they_are(tmp_path, content):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    found = corpus(path, unit="byte")
    assert found.text.text().encode("latin-1") == content
    (source,) = found.sources
    assert (source.characters, source.repairs, source.notes) == (len(content), (), ())
    assert source.sha256 == source.file_sha256


def test_bytes_of_an_empty_file_are_refused(tmp_path):
    path = tmp_path / "a.bin"
    path.touch()
    with pytest.raises(UserError, match="is empty, but must be a text: give another"):
        corpus(path, unit="byte")


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_missing_benchmark_file_is_answered_with_its_address(tmp_path, name):
    with pytest.raises(
        UserError, match=rf"does not exist: download https://mattmahoney\.net/dc/{name}\.zip, unpack it"
    ):
        corpus(tmp_path / name)


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_benchmark_config_has_the_split_of_the_literature(name):
    data = load_config(name).data
    assert sizes(100_000_000, data) == (90_000_000, 5_000_000)
    assert data.max_megabytes * 1e6 >= 100_000_000
    assert (data.unit == "byte") == (name == "enwik8")
