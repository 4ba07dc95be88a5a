"""A model as a page is one safe file, written atomically; wrong names and large models are refused."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from typing import Any

import jax
import numpy as np
import pytest

from chargpt_jax.api import Model
from chargpt_jax.errors import UserError
from chargpt_jax.interop import convert, html_page
from chargpt_jax.interop.html_page import About
from chargpt_jax.main import main
from chargpt_jax.pictures import page_assets
from tests.interop.page_models import block, page, random_model
from tests.interop.test_convert import original, write


class Tags(HTMLParser):
    """The tags of a page with their attributes, and the text in scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE = About("</script><img src=x onerror=alert(1)>", 3, 1.25, ["<!--<script>", "\u2028 & ' \" ]]>"])


def test_text_of_a_model_cannot_leave_its_block():
    model = random_model(vocabulary="</script>!-[]&\"'\u2028\u2029\0\ud800")
    text = page(model, HOSTILE)
    tags = Tags(text)
    assert [tag for tag, _ in tags.tags if tag in ("script", "img", "iframe", "object")] == ["script"] * 3
    assert not [name for _, given in tags.tags for name in given if name.startswith("on")]
    data = json.loads(block(text, "model"))
    assert data["vocabulary"] == list(model.tokenizer.vocabulary)
    assert data["about"] == {"name": HOSTILE.name, "step": 3, "loss": 1.25, "texts": list(HOSTILE.texts)}


def test_policy_allows_the_pages_script_and_no_request():
    tags = Tags(page(random_model()))
    (policy,) = [given["content"] for _, given in tags.tags if given.get("http-equiv") == "Content-Security-Policy"]
    code = max((text for text in tags.texts if "createModel" in text), key=len)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert html.unescape(policy or "") == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert not {"src", "href", "action", "srcset"} & {name for _, given in tags.tags for name in given}


@pytest.mark.parametrize("name", html_page.SCRIPTS)
def test_scripts_insert_text_only_as_text(name):
    code = page_assets.asset(f"{name}.js")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(|srcdoc", code)


def test_scripts_of_a_page_have_no_name_twice():
    """They are one script: a second function of a name would replace the first one."""
    code = "\n".join(page_assets.asset(f"{name}.js") for name in html_page.SCRIPTS)
    names = re.findall(r"^(?:function\*?|class|const|let) (\w+)", code, re.MULTILINE)
    assert "createModel" in names
    assert len(names) == len(set(names))


def test_parameters_in_the_page_are_bit_identical():
    model = random_model("odd")
    text = page(model)
    values = np.frombuffer(base64.b64decode(block(text, "parameters")), "<f4")
    names, at = json.loads(block(text, "model"))["names"], 0
    for (name, size), (expected_name, array) in zip(names, html_page.arrays(model.params, 3), strict=True):
        assert name == expected_name
        np.testing.assert_array_equal(values[at : at + size], np.asarray(array).ravel())
        at += size
    assert at == len(values) == sum(x.size for x in jax.tree.leaves(model.params))


def exported(model: Model, path) -> Any:
    return convert.export("html", model.config, model.tokenizer, model.params, path, print)


def test_page_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    model = random_model()
    size = len(page(model, About("page")).encode())
    monkeypatch.setattr(html_page, "MAX_PAGE", size - 1)
    with pytest.raises(UserError, match=r"would have 0 MB \(5,504 parameters\).*the maximum.*--format=hf"):
        exported(model, tmp_path / "new" / "page.html")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(html_page, "MAX_PAGE", size)
    assert exported(model, tmp_path / "new" / "page.html").stat().st_size == size


def test_page_does_not_replace_a_file(tmp_path):
    model = random_model()
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "broken.html").symlink_to("nothing.html")
    (tmp_path / "folder.html").mkdir()
    for name in ("mine.html", "broken.html", "folder.html"):
        with pytest.raises(UserError, match=f"{name}', which exists already: give the name of a new file"):
            exported(model, tmp_path / name)
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.html", "folder.html", "mine.html"]


def test_page_needs_the_name_of_a_page(tmp_path):
    model = random_model()
    for name, better in (("page", "page.html"), ("page.txt", "page.txt.html"), (".", "model.html")):
        with pytest.raises(UserError, match=rf"must end in \.html: give '.*{re.escape(better)}'"):
            exported(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="too long.*: choose another file"):
        exported(model, tmp_path / f"{'x' * 300}.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another file"):
        exported(model, tmp_path / "file" / "page.html")


def test_failed_page_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.atomic.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(random_model(), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_command_exports_a_page(tmp_path, capsys):
    run = tmp_path / "a run"
    assert main(["chargpt", "--mode=import", f"--from={write(tmp_path, original(), 'pt')}", f"--workdir={run}"]) == 0
    line = ["chargpt", "--mode=export", f"--workdir={run}", "--format=html"]
    path = tmp_path / "deep" / "er" / "page.html"
    capsys.readouterr()
    assert main([*line, f"--out={path}"]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert json.loads(block(path.read_text(encoding="utf-8"), "model"))["about"] == {
        "name": "a run",
        "step": 0,
        "loss": None,
        "texts": [],
    }
    for words in ([], [f"--out={path}"], [f"--out={tmp_path}"]):
        assert main([*line, *words]) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1
        assert not shown.out
