"""Self-contained pages: the policy allows the one script by its hash, and data cannot leave its element."""

import base64
import hashlib
import html
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.pictures.page_assets import asset, compact, data_block, document, script

SCRIPTS = ("subline", "cursor", "stages", "report")


def policy_of(page: str) -> str:
    """Return the content security policy of a page."""
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found
    return html.unescape(found[1])


def test_policy_allows_the_script_by_its_hash_and_nothing_else():
    page = document("A page", "<p>text</p>", scripts=SCRIPTS)
    (code,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy_of(page)
    assert "default-src 'none'" in policy_of(page)
    assert "unsafe-eval" not in policy_of(page)


def test_page_without_scripts_allows_none():
    page = document("A page", "<p>text</p>")
    assert "<script" not in page
    assert "script-src" not in policy_of(page)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(json_values | st.sampled_from(["</script>", "<!--<script>", "]]>", {"a": "</SCRIPT >"}]))
def test_data_block_keeps_its_value_and_has_no_markup(value):
    block = data_block("some", value)
    inner = block.partition(">")[2].removesuffix("</script>")
    assert json.loads(inner) == value
    assert "<" not in inner


def test_data_block_refuses_what_json_cannot_hold():
    with pytest.raises(ValueError, match="JSON"):
        data_block("some", float("nan"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_insert_no_markup_and_send_no_request(name):
    banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|fetch\(|XMLHttp|import\("
    assert not re.search(banned, asset(f"{name}.js"))


def test_script_is_one_function_that_leaves_no_name_behind():
    code = script("subline", "notebook")
    assert code.startswith('(() => {\n"use strict";')
    assert code.endswith("})();")
    assert "</script" not in code


def test_compact_keeps_what_a_page_shows():
    sample = {
        "prompt": "a",
        "text": "ab",
        "tokens": ["a", "b"],
        "surprisal": [None, 1.23456789],
        "entropy": [None, 0.5],
        "surprise_surprise": [None, 0.25],
        "vocab_size": 64,
        "rank": [None, 2],
        "alternatives": [None, [["c", 0.7123456], ["b", 0.2]]],
        "sampled_probability": [None, 0.123456789],
    }
    found = compact(sample)
    assert "text" not in found
    assert found["surprisal"] == [None, 1.2346]
    assert found["alternatives"] == [None, [["c", 0.7123], ["b", 0.2]]]
    assert found["sampled_probability"] == [None, 0.12346]
    assert found["rank"] == [None, 2]
