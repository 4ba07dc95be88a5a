"""Loading local files; test_download.py tests downloads."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.config import DataConfig
from chargpt_jax.data import corpus
from chargpt_jax.data.corpus import Source, changed_files, load_corpus, read_text, text_pieces
from chargpt_jax.data.repair import ALL, DEFAULT
from chargpt_jax.data.sources import entries_of, stdlib_text
from chargpt_jax.errors import UserError

STORY = "\n".join(f"CHAPTER {n}\n\nIt was day {n}, and nothing had happened yet." for n in range(1, 60))
HEADER = "The Project Gutenberg EBook of A Story\n\nTitle: A Story\n   of Days\n\nAuthor: Nobody\n\n"
START = "*** START OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\n\n"
END = "\n\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\nUpdated editions will replace the previous one.\n"


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


# The text that ships with Python


def test_stdlib_text_is_ascii_and_needs_128_embeddings() -> None:
    alphabet = set(stdlib_text())
    assert alphabet <= {"\n", *map(chr, range(32, 127))}
    assert 64 < len(alphabet) + 1 <= 128  # with padding, aligned to a multiple of 64
    assert len(stdlib_text()) > 400_000


def test_stdlib_is_a_source(cache: Path) -> None:
    text, (source,) = load("stdlib", cache)
    assert text == stdlib_text()
    assert (source.kind, source.stand_in_for, source.fixes) == ("stdlib", None, ())


# Local files


def test_a_file_is_read_and_described(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    text, (source,) = load(str(file), cache)
    assert text == STORY
    sha256 = hashlib.sha256(STORY.encode()).hexdigest()
    assert source == Source(
        "story", "file", str(file), sha256, len(STORY), (), repairs=DEFAULT, notes=(), file_sha256=sha256
    )
    assert json.loads(json.dumps(dataclasses.asdict(source)))["characters"] == len(STORY)
    assert files_in(cache) == {}


def test_a_folder_gives_its_texts_in_order_of_name_and_reports_the_rest(cache: Path, tmp_path: Path) -> None:
    for name in ("b.txt", "A.TXT", "c.md", "README", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\0\0")
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    text, sources = load(str(tmp_path), cache)
    assert text == "A.TXT\nREADME\nb.txt\nc.md\nwide"
    assert [source.url for source in sources][:2] == [f"{tmp_path}/A.TXT", f"{tmp_path}/README"]
    assert "left out .hidden, d.txt, empty.txt, photo.jpg of" in sources[0].notes[0]
    assert not any("left out" in note for source in sources[1:] for note in source.notes)


def test_a_folder_without_texts_is_refused(cache: Path, tmp_path: Path) -> None:
    assert "has no text file" in refusal(str(tmp_path), cache)


def test_an_existing_path_goes_before_a_gutenberg_number(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1984").mkdir()
    (tmp_path / "1984" / "a.txt").write_text("a diary")
    assert load("1984", cache)[0] == "a diary"


def test_the_maximum_size_is_that_of_all_texts_together(cache: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 400)
    assert len(load(str(tmp_path), cache, max_megabytes=1.2e-3)[0]) == 1_202
    assert "together are larger" in refusal(str(tmp_path), cache, max_megabytes=1.1e-3)
    assert "together are larger" in refusal(f"{tmp_path}/a.txt,{tmp_path}", cache, max_megabytes=1.2e-3)


def test_all_unreadable_files_are_named_at_once(cache: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("fine" if name == "b" else "Ein Käse, größer als süß " * 9, "latin-1")
    message = refusal(str(tmp_path), cache)
    assert "2 texts cannot be read" in message
    assert "a.txt" in message
    assert "c.txt" in message
    assert "--config.data.encoding=cp1252" in message
    assert load(str(tmp_path), cache, encoding="cp1252")[0].count("Käse") == 18


@pytest.mark.parametrize("source", ["https://a.example/list?ids=1,60", "https://a.example/a,b"])
def test_a_comma_that_may_belong_to_a_url_is_refused(cache: Path, source: str) -> None:
    assert "write it as %2C, or write a space after it" in refusal(source, cache)


def test_a_url_ends_at_a_comma_with_a_space_or_before_another_url() -> None:
    assert entries_of("https://a.example, 60,https://b.example/c,https://d.example") == [
        "https://a.example",
        "60",
        "https://b.example/c",
        "https://d.example",
    ]


def test_book_0_is_refused(cache: Path) -> None:
    assert "numbered from 1" in refusal("00", cache)


def test_a_file_that_is_linked_in_its_own_folder_is_read_once(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("only once\n")
    (folder / "a.txt").symlink_to(folder / "b.txt")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    text, (source,) = load(str(folder), cache)
    assert text == "only once\n"
    assert source.notes == (
        f"left out a.txt, gone.txt of {folder} (hidden, empty, binary, a duplicate, or not a file)",
    )


def test_a_short_poem_between_both_markers_is_a_book(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text(HEADER + START + "I met a traveller" + END)
    assert load(str(tmp_path / "poem.txt"), cache)[0] == "I met a traveller"


def test_a_path_with_comma_spaces_and_other_letters_is_one_source(cache: Path, tmp_path: Path) -> None:
    odd = tmp_path / "naïve, 60, ça va 文.txt"
    odd.write_text("odd")
    (tmp_path / "plain.txt").write_text("plain")
    assert load(str(odd), cache)[1][0].url == str(odd)
    text, sources = load(f"{tmp_path}/plain.txt,{odd},{tmp_path}/plain.txt", cache)
    assert text == "plain\nodd\nplain"
    assert sources[1].title == "naïve, 60, ça va 文"


def test_a_byte_order_mark_and_foreign_line_ends_are_normalised(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "dos.txt"
    file.write_bytes(b"\xef\xbb\xbf\r\none\r\ntwo\rthree\n\nfour\r\n")
    assert load(str(file), cache)[0] == "\none\ntwo\nthree\n\nfour\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n\t", "has only white space"),
        (b"abc\0def", "binary (NUL at byte 3)"),
        (b"abcd\xffe", "cannot be read as utf-8 at byte 4"),
        (b"\xef\xbb\xbfab\r\n\xc3", "cannot be read as utf-8 at byte 7"),
    ],
)
def test_a_bad_file_is_refused_by_name(cache: Path, tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(data)
    message = refusal(str(file), cache, allow_stand_in=True)
    assert str(file) in message
    assert said in message


@pytest.mark.parametrize("source", ["/no/such/file.txt", "gone.txt", "6O", "x" * 5000])
def test_missing_path_is_rejected_even_if_stand_in_is_allowed(cache: Path, source: str) -> None:
    assert "does not exist" in refusal(source, cache, allow_stand_in=True)


@pytest.mark.parametrize("source", ["", " , ", "ftp://127.0.0.1/a.txt", "http://[/a.txt", "http://", "file:///a.txt"])
def test_source_that_cannot_be_fetched_is_rejected(cache: Path, source: str) -> None:
    message = refusal(source, cache, allow_stand_in=True)
    assert source.strip() in message
    assert "give" in message


def test_a_changed_file_is_found(cache: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    config = settings_for(str(tmp_path))
    _, sources = load_corpus(config, cache=cache, warn=pytest.fail)
    saved = json.loads(json.dumps([dataclasses.asdict(source) for source in sources]))
    assert changed_files(config, saved) == []
    (tmp_path / "b.txt").write_text("c")
    assert changed_files(config, saved) == [f"{tmp_path}/b.txt"]
    (tmp_path / "b.txt").unlink()
    assert changed_files(config, saved) == []


# Texts to score


def test_text_to_score_is_read_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff\r\n  “cafÃ©”\r\rCHAPTER 1\n".encode())
    assert read_text(file) == read_text(str(file)) == "\n  “cafÃ©”\n\nCHAPTER 1\n"
    assert read_text(file, DataConfig(), pytest.fail) == "\n  “cafÃ©”\n\nCHAPTER 1\n"


def test_a_book_to_score_is_cut_like_the_corpus(cache: Path, tmp_path: Path) -> None:
    file, config = tmp_path / "book.txt", DataConfig(start_at="^CHAPTER 2$")
    file.write_text(HEADER + START + STORY + END)
    said: list[str] = []
    text = read_text(file, config, said.append)
    assert text == load(str(file), cache, start_at="^CHAPTER 2$")[0]
    (line,) = said
    assert "licence removed at lines 1-8" in line
    assert "data.start_at was applied" in line
    (tmp_path / "empty.txt").write_bytes(b"")
    assert read_text(tmp_path / "empty.txt") == ""


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"abc\0def", "binary (NUL at byte 3)"),
        (b"abcd\xffe", "cannot be read as utf-8 at byte 4"),
    ],
)
def test_file_that_is_not_a_text_is_rejected(tmp_path: Path, data: bytes | None, said: str) -> None:
    file = tmp_path / "bad.txt"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_text(file)
    assert str(file) in str(caught.value)
    assert said in str(caught.value)


def test_a_folder_is_not_read_as_a_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        read_text(tmp_path)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_large_text_to_score_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_end: str
) -> None:
    monkeypatch.setattr(corpus, "MAX_SCORED", 100)
    monkeypatch.setattr(corpus, "SCORED_AT_ONCE", 64)
    file, said = tmp_path / "a.txt", list[str]()
    file.write_text(STORY, newline=line_end)
    pieces = list(text_pieces(str(file), DataConfig(), said.append))
    assert "".join(pieces) == STORY
    assert max(map(len, pieces)) <= 66
    assert len(said) == 1
    assert "no licence is removed" in said[0]


# Licence and start_at


OLD = "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this here?\n\n"
OLD_START = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
NEW_END = "*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (HEADER + START, END),
        (HEADER + "*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n", "\n" + NEW_END),
        (HEADER + "*** START OF THE PROJECT GUTENBERG EBOOK A STORY\nIN SO MANY DAYS ***\n", "\n" + NEW_END),
        (HEADER + "***START OF  THE PROJECT GUTENBERG E-TEXT A STORY***\n", "\n***END OF THE PROJECT GUTENBERG ETEXT"),
        (HEADER + "*** Start of this Project Gutenberg eBook A STORY\n\n", "\n" + NEW_END.lower()),
        (HEADER + "End of Project Gutenberg's header\n\n" + START, END),
        (HEADER + START, "\nEnd of the Project Gutenberg EBook of A Story, by Nobody\n\n" + NEW_END),
        (HEADER + START, "\n  End of Project Gutenberg's A Story, by Nobody\n\n" + NEW_END),
        (HEADER + START, "\nEnd of Project Gutenberg’s Etext of A Story\n"),
        (HEADER + START + "Produced by A. Person and\nthe others\n\n\n", END),
        (HEADER + OLD + OLD_START, "\n\nEnd of The Project Gutenberg Etext of A Story\n"),
        (HEADER + OLD + "*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*\n", "\nEnd of Project Gutenberg Etext"),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_the_licence_is_cut_off(cache: Path, tmp_path: Path, before: str, after: str, line_end: str) -> None:
    file = tmp_path / "pg1.txt"
    file.write_text("\ufeff" + before + STORY + after, encoding="utf-8", newline=line_end)
    text, (source,) = load(str(file), cache)
    assert text == STORY
    assert (source.title, source.kind) == ("A Story of Days", "file")


def test_a_file_without_markers_is_unchanged(cache: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "mine.txt", f"{STORY}\nthe end of the Project Gutenberg"
    file.write_text(text)
    loaded, (source,) = load(str(file), cache)
    assert (loaded, source.title, source.notes) == (text, "mine", ())


@pytest.mark.parametrize(
    "book",
    [
        HEADER + START + END,
        HEADER + START + "x" * 999,
        "x" * 2_000 + END + "licence" * 4_000,
    ],
)
def test_implausibly_short_rest_is_rejected(cache: Path, tmp_path: Path, book: str) -> None:
    file = tmp_path / "pg1.txt"
    file.write_text(book)
    assert "after removing the licence text" in refusal(str(file), cache)


def test_a_text_begins_where_start_at_first_matches(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "pg1.txt"
    file.write_text(HEADER + "CHAPTER 9\n" + START + "Contents: CHAPTER 1\n\n" + STORY + END)
    assert load(str(file), cache, start_at=r"^CHAPTER \d")[0] == STORY
    assert load(str(file), cache, start_at=r"^CHAPTER 9$")[0] == STORY[STORY.index("CHAPTER 9") :]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("^PROLOGUE", "no match"), ("CHAPTER (", "regular expression"), ("CHAPTER 59", "after data.start_at")],
)
def test_a_bad_start_at_is_refused(cache: Path, tmp_path: Path, pattern: str, said: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(STORY)
    message = refusal(str(file), cache, start_at=pattern)
    assert said in message
    assert "data.start_at" in message


def test_texts_are_joined_by_one_line_break(cache: Path, tmp_path: Path) -> None:
    for name, text in (("a", "  one\n"), ("b", "two"), ("c", "three\n\n"), ("d", "four\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert load(str(tmp_path), cache)[0] == "  one\ntwo\nthree\n\nfour\n"


# Repair of encoding errors


def test_a_text_keeps_what_its_author_may_have_meant(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(
        "\u3000\u3000今天天气很好，“我们”去公园吧！１２３ &amp; ﬁn\nThe cafÃ©, re\u0301sume\u0301.\n", encoding="utf-8"
    )
    text, (source,) = load(str(file), cache)
    assert text == "\u3000\u3000今天天气很好，“我们”去公园吧！１２３ &amp; ﬁn\nThe café, résumé.\n"
    assert source.repairs == DEFAULT
    assert source.notes == ("repaired 1 line (mojibake, nfc)",)
    assert (source.sha256, source.characters) == (hashlib.sha256(text.encode()).hexdigest(), len(text))


def test_a_book_of_project_gutenberg_gets_every_repair(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(HEADER + START + STORY + "\nThe cafÃ© said “no”." + END, encoding="utf-8")
    text, (source,) = load(str(file), cache)
    assert text == STORY + '\nThe café said "no".'
    assert source.repairs == ALL
    assert ("apply", "uncurl_quotes") in source.fixes
    assert any("decode" in parameter for _, parameter in source.fixes)
    assert source.notes[-1] == "repaired 1 line (mojibake, quotes)"


@pytest.mark.parametrize(
    ("repair", "wanted"), [("none", "“cafÃ©”"), ("mojibake", "“café”"), ("quotes", '"cafÃ©"'), ("all", '"café"')]
)
def test_repairs_can_be_chosen(cache: Path, tmp_path: Path, repair: str, wanted: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("“cafÃ©”", encoding="utf-8")
    assert load(str(file), cache, repair=repair)[0] == wanted


def test_an_unknown_repair_is_refused(cache: Path) -> None:
    assert "data.repair names 'everything', but must be" in refusal("stdlib", cache, repair="nfc, everything")


def test_clean_text_has_no_repairs(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(STORY)
    assert load(str(file), cache)[1][0].fixes == ()


def test_no_explanation_from_ftfy_means_no_fixes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftfy, "fix_and_explain", lambda text, config: ftfy.ExplainedText(text, None))
    file = tmp_path / "a.txt"
    file.write_text("é")
    assert load(str(file), cache)[1][0].fixes == ()


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=80)
PIECES = st.sampled_from(["\r", "\n", "\r\n", "\ufeff", "“", "Ã©", "&amp;", "<", "*** ", " ", "e\u0301"])


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS | PIECES, max_size=6).map("".join), st.sampled_from(["auto", "all"]))
def test_text_without_markers_is_normalised_and_repaired(
    tmp_path_factory: pytest.TempPathFactory, written: str, how: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    file, cache = folder / "any.txt", folder / "never made"
    file.write_bytes(written.encode())
    plain = written.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if how == "all":  # the text as a whole, as in the original
        wanted = ftfy.fix_and_explain(plain).text
    else:
        mild = ftfy.TextFixerConfig(
            unescape_html=False,
            remove_terminal_escapes=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            remove_control_chars=False,
        )
        wanted = "\n".join(ftfy.fix_and_explain(line, mild).text for line in plain.split("\n"))
    if not wanted.strip():
        assert re.search("is empty|only white space", refusal(str(file), cache, repair=how))
        return
    text, (source,) = load(str(file), cache, repair=how)
    assert text == wanted
    assert (source.sha256, source.characters) == (hashlib.sha256(wanted.encode()).hexdigest(), len(wanted))
