"""Licences are removed from a text in a file as from one in memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.data import gutenberg
from chargpt_jax.data.streams import licences
from chargpt_jax.data.streams.licences import Watch, removal
from chargpt_jax.data.streams.text_file import TextFile, joined

STORY = "".join(f"It was day {n},\nand nothing had happened.\n\n" for n in range(40))
PARTS = st.sampled_from(
    [
        *("*** START OF THIS PROJECT GUTENBERG EBOOK A ***\n", "*** END OF THE PROJECT GUTENBERG EBOOK A ***\n"),
        *("The Project Gutenberg EBook of A\n\nTitle: A\n   of B\n\n", "End of the Project Gutenberg EBook of A\n\n"),
        *(
            "Produced by Nobody\n\n",
            "[Transcriber's\n note: none]\n\n",
            "Transcriber’s Notes\n\n",
            "\n",
            "\n \n",
            "\n\n\n",
        ),
        *(
            "A donation to Project Gutenberg-tm, by its licence.\n\n",
            "All electronic works are free.\n\n",
            STORY,
            STORY,
        ),
        *(
            "***END OF THE SMALL\nPRINT! etc.\n",
            "subscribe to our email newsletter to hear about new eBooks.\n",
            "one\n",
            "***\n",
        ),
        *(
            "*** START OF THE\n",
            "PROJECT\n",
            "GUTENBERG EBOOK\n",
            "end of this etext\n",
            "no line end",
            "*** END OF THIS ",
        ),
    ]
)


def without_licence(text: str, size: int) -> tuple[object, ...] | None:
    file, watch = TextFile(), Watch()
    for piece in watch.watch(text[i : i + size] for i in range(0, len(text), size)):
        file.append(piece)
    found = removal(file, watch)
    return found and ("".join(joined(file, found.kept)), found.title, found.lines, found.notes, found.certain)


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(PARTS, max_size=16), size=st.sampled_from([97, 1000, 100_000]), around=st.sampled_from([300, 3_000])
)
def test_removal_in_pieces_equals_the_whole(parts, size, around):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(licences, "AROUND", around)
        patch.setattr(gutenberg, "MAX_HEAD", 2_000)
        found, whole = without_licence(text, size), gutenberg.cut(text)
    assert found == (whole and tuple(whole))


def test_removal_reads_only_what_surrounds_the_markers(monkeypatch):
    start, end = (
        "*** START OF THIS PROJECT GUTENBERG EBOOK A ***\n\n",
        "*** END OF THIS PROJECT GUTENBERG EBOOK A ***\n\n",
    )
    text = ("Title: A\n\n" + start + 400 * STORY + end + "Updated editions will replace it.\n\n") * 2
    read, find = [], gutenberg.find
    monkeypatch.setattr(gutenberg, "find", lambda text, *ends: read.append(len(text)) or find(text, *ends))
    found = without_licence(text, 1 << 20)
    assert sum(read) < 6 * licences.AROUND < len(text) / 2
    assert found == tuple(gutenberg.cut(text))
