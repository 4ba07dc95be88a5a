"""Removing Project Gutenberg's own text from one or more books; test_corpus.py has the markers of a single book."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.data import gutenberg
from chargpt_jax.data.gutenberg import MAX_GAP, cut, licence_line

BOOK = "\n".join(f"It was day {n}, and nothing had happened yet." for n in range(60))
OTHER = "\n\n".join(f"The whale was seen on day {n}." for n in range(60))
DIARY = "\n\n".join(f"My own diary, day {n}: it rained again." for n in range(60))
HEADER = "The Project Gutenberg EBook of {0}\n\nTitle: {0}\n\nAuthor: Nobody\n\n"
START = "*** START OF THIS PROJECT GUTENBERG EBOOK {0} ***\n"
END = "*** END OF THIS PROJECT GUTENBERG EBOOK {0} ***\n"
LICENCE = (
    "Updated editions will replace the previous one.\n\n"
    + "Redistribution is subject to the trademark license. " * 12
    + "\n\n"
    + "1.E.1. The following sentence must appear prominently. " * 12
    + "\n\nThis website includes information about Project Gutenberg,\nhow to help produce our new eBooks, and how to "
    "subscribe to our\nemail newsletter to hear about new eBooks.\n"
)


def book(title: str, text: str) -> str:
    return HEADER.format(title) + START.format(title) + "\n" + text + "\n\n" + END.format(title) + "\n" + LICENCE


def test_every_book_of_a_file_is_kept() -> None:
    text = book("A", BOOK) + "\n\n" + book("B", OTHER) + book("C", BOOK)
    found = cut(text)
    assert found is not None
    assert found.text == f"{BOOK}\n\n{OTHER}\n\n{BOOK}"
    assert found.title == "A, B, C"
    lines = text.split("\n")
    assert "\n".join(lines[first - 1] for first, _ in found.lines).startswith("The Project Gutenberg EBook of A")
    removed = sum(last - first + 1 for first, last in found.lines)
    assert removed + found.text.count("\n") + 1 <= len(lines)


@pytest.mark.parametrize(
    "licence",
    [
        LICENCE,
        "licence text here\n",
        "Small print\n\n" + "words of it. " * 40 + "\n\nProject Gutenberg-tm electronic works",
    ],
)
def test_a_text_between_or_around_books_is_kept(licence: str) -> None:
    parts = [DIARY, book("A", BOOK).replace(LICENCE, licence), DIARY, book("B", OTHER), DIARY]
    found = cut("\n\n".join(parts))
    assert found is not None
    assert found.text == "\n\n".join([DIARY, BOOK, DIARY, OTHER, DIARY])


@pytest.mark.parametrize(
    ("text", "title"),
    [
        (HEADER.format("A") + START.format("A") + BOOK, "A"),
        ("THE FIRST LINE OF SOME HEAD\n\n" + START.format("A") + BOOK, None),
        (BOOK + "\n\n" + END.format("A") + LICENCE, None),
        (BOOK + "\n\nEnd of Project Gutenberg&rsquo;s A, by Nobody\n\n" + LICENCE, None),
        (BOOK + "\n\nEnde dieses Projekt Gutenberg Etextes A\n\n" + LICENCE, None),
        (BOOK + "\n\nENDE DES PROJEKTS GUTENBERG A\n" + LICENCE, None),
        (BOOK + "\n\nFin du Projet Gutenberg A, par Personne\n\n" + LICENCE, None),
        (BOOK + "\n\nFin de Project Gutenberg's A\n\n" + LICENCE, None),
        (BOOK + "\n\nFin del Proyecto Gutenberg de A\n\n" + LICENCE, None),
        (BOOK + "\n\nFine del Progetto Gutenberg A\n\n" + LICENCE, None),
        (BOOK + "\n\nEinde van het Project Gutenberg eBook A\n\n" + LICENCE, None),
        (BOOK + "\n\nThe End of the Project Gutenberg Etext of A\n", None),
        (BOOK + "\n\nEnd of this Etext of A\n\n" + LICENCE, None),
        (BOOK + "\n\nEnd of this Etext.\n", None),
        (BOOK + "\n\n*** End of the Project Gutenberg E-text A\n" + LICENCE, None),
        (
            "***This is the Project Gutenberg Etext of A***\n\nMarch, 1994  [Etext #0]\n\n"
            "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWe are not liable.\n"
            "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n" + BOOK,
            None,
        ),
    ],
)
def test_one_marker_is_enough(text: str, title: str | None) -> None:
    found = cut(text)
    assert found is not None
    assert (found.text, found.title) == (BOOK, title)


@pytest.mark.parametrize(
    "credit",
    [
        "Produced by A. Person and\nthe others",
        "E-text prepared by A. Person",
        "This etext was prepared by A. Person",
        "This eBook was produced and proofread by A. Person",
        "Produced by the Online Distributed Proofreading Team",
        "Produit par A. Personne",
        "Transcribed from the 1913 Methuen edition by A. Person",
        "Produced by A. Person\n\nCredits: B. Person",
    ],
)
def test_credits_are_removed_and_a_transcribers_note_is_reported(credit: str) -> None:
    note = "[Transcriber's Note: old spellings are kept.]"
    text = START.format("A") + f"\n{credit}\n\n\n{note}\n\n{BOOK}"
    found = cut(text)
    assert found is not None
    assert found.text == f"{note}\n\n{BOOK}"
    assert [text.split("\n")[line - 1] for line in found.notes] == [note]


@pytest.mark.parametrize("changed", ["GUTENBERG™", "GUTENBERG-tm", "GUTENBERG"])
@pytest.mark.parametrize("stars", ["***", "* * *", "\ufeff***"])
def test_markers_in_other_spellings(changed: str, stars: str) -> None:
    text = book("A", BOOK).replace("PROJECT GUTENBERG", f"PROJECT {changed}").replace("*** ", f"{stars} ")
    found = cut(text)
    assert found is not None
    assert (found.text, found.certain) == (BOOK, True)


def test_a_head_that_begins_with_a_welcome_is_removed() -> None:
    head = "**Welcome To The World of Free Plain Vanilla Electronic Texts**\n\nThe Project Gutenberg Etext of A\n\n"
    found = cut(DIARY + "\n\n" + head + "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*END*\n\n" + BOOK)
    assert found is not None
    assert found.text == f"{DIARY}\n\n{BOOK}"


def test_paragraphs_behind_a_book_are_kept_though_one_speaks_of_a_licence() -> None:
    own = "\n\n".join([*(f"My own chapter {n}." for n in range(5)), "My driving licence expired.", "It was an ebook."])
    found = cut(book("A", BOOK) + "\n" + own)
    assert found is not None
    assert found.text == f"{BOOK}\n\n{own}"
    found = cut(BOOK + "\n\n" + END.format("A") + "\n" + own)
    assert found is not None
    assert found.text == f"{BOOK}\n\n{own}"


def test_a_sentence_about_a_product_is_no_credit() -> None:
    sentence = "Produced by the factory of Leeds, the cloth was blue."
    found = cut(START.format("A") + f"\n{sentence}\n\n{BOOK}")
    assert found is not None
    assert found.text == f"{sentence}\n\n{BOOK}"


def test_a_licence_that_is_kept_is_found() -> None:
    assert licence_line("a\nb, says the Project Gutenberg™ License\n") == 2
    assert licence_line("An essay on Project Gutenberg.\n1.A. Its electronic works\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        BOOK,
        "We met at the end of the Project Gutenberg party.\n" + BOOK,
        BOOK + "\n\nFin",
        BOOK + "\nThe End of this Etextile factory",
        "I read *** START OF THE PROJECT GUTENBERG EBOOK *** somewhere\n" + BOOK,
    ],
)
def test_a_text_that_only_mentions_gutenberg_has_no_marker(text: str) -> None:
    assert cut(text) is None


PIECES = st.sampled_from(
    [
        HEADER.format("A"),
        START.format("A"),
        END.format("A"),
        LICENCE,
        DIARY + "\n\n",
        "x\n",
        "\n\n",
        "w" * MAX_GAP + "\n\n",
    ]
)


@pytest.mark.parametrize("before", ["The Project Gutenberg EBook of A\n\nTitle: A\n\n", "x\n"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_text_directly_behind_further_end_markers_is_kept(times: int, before: str) -> None:
    end = "*** END OF THIS PROJECT GUTENBERG EBOOK A ***\n"
    found = cut(end + before + times * end + DIARY)
    assert found is not None
    assert found.text == DIARY.strip()


@given(st.lists(PIECES, max_size=8))
def test_what_is_not_gutenbergs_is_never_removed(pieces: list[str]) -> None:
    """Without a marker in front, or with a heading in between, no diary is lost."""
    text = "".join(pieces)
    found = cut(text)
    if found is None:
        return
    kept = sum(part in found.text for part in DIARY.split("\n\n"))
    first = text.find("START OF")
    alone = DIARY in text and first < 0
    if alone:
        assert kept == 60
    assert all(line.strip() in text for line in found.text.split("\n"))


WORDED = st.sampled_from(
    [
        *("*** START OF THIS PROJECT GUTENBERG EBOOK A ***", "End of Project Gutenberg's A", "END OF THE ETEXT OF A"),
        *("end of this e-text.", "END*THE SMALL PRINT! x", "*END THE\u017fmall\u00a0pr\u0131nt", "Fin de Projet"),
        *("END THE \u017fMALL PR\u0130NT", "[Tran\u017fcr\u0131ber's notes: a]", "[Transcriber's Note: b]"),
        *("note by the transcriber", "Gutenberg-tm", "small print", "gutenberg licen\u017fe", "A line", "\u212a"),
        *("\n", "\n", "\n", "\n\n", " ", "é日本"),
    ]
)
"""Also with letters that patterns take for i, s and k, because they ignore case."""


@settings(deadline=None)
@given(st.lists(WORDED, max_size=8).map("".join))
def test_search_for_words_misses_no_pattern(text):
    patterns = gutenberg._START, gutenberg._END
    assert list(gutenberg.may_have_marker(text)) == [m.start() for one in patterns for m in one.finditer(text)]
    assert list(gutenberg.notes(text)) == [match.span() for match in gutenberg._NOTES.finditer(text)]
    found = gutenberg._LICENCE_NAMES.search(text)
    assert gutenberg.licence_line(text) == (found and text.count("\n", 0, found.start()) + 1)
