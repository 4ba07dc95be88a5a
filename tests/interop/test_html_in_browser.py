"""A model as a page, opened from a file in Chromium: it requests nothing, and a keyboard is enough."""

import pytest

from chargpt_jax.interop import convert
from chargpt_jax.interop.html_page import About
from tests.browser import chromium, opened
from tests.interop.page_models import random_model

PROMPT = "ab c"
COUNT = 40


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def model():
    model = random_model()
    model.config.sample.prompts, model.config.sample.temperature = (PROMPT,), 0.0
    model.config.sample.max_new_tokens = COUNT
    return model


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    about = About("a run", 7, 1.25, ["A title"])
    out = tmp_path_factory.mktemp("page") / "page é.html"
    return convert.export("html", model.config, model.tokenizer, model.params, out, print, about)


@pytest.fixture
def page(browser, path):
    with opened(browser, path, phone=True) as page:
        page.wait_for_selector("#form:not([hidden])")
        yield page


def generated(page, count=COUNT) -> str:
    """Wait for the end, and return the text that the page shows."""
    page.wait_for_selector(f"#status:has-text('{count} characters generated')")
    return shown(page)


def shown(page) -> str:
    return "".join(page.locator(".cg-flow > span").all_text_contents())


def symbols(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "→")


@pytest.fixture(scope="module")
def greedy(model) -> str:
    return symbols(model.generate(PROMPT, COUNT, temperature=0)[0].text)


@pytest.mark.slow
def test_page_generates_pythons_greedy_text_in_a_browser(page, greedy):
    page.click("#write")
    assert generated(page) == greedy
    assert "characters per second" in page.inner_text("#speed")
    assert page.inner_text("h1") == "a run"
    assert "5,504 parameters" in page.inner_text("#what")
    assert "1.2500 nats" in page.inner_text("#facts")
    assert page.locator(".cg-prompt").count() == len(PROMPT)


def test_continue_goes_on_as_one_text(page, greedy):
    page.fill("#count", "15")
    page.click("#write")
    generated(page, 15)
    page.fill("#count", "25")
    page.fill("#prompt", "Q: another prompt, which does not matter here")
    page.click("#continue")
    assert generated(page, 25) == greedy


def test_click_on_an_alternative_branches(page, model, greedy):
    page.click("#write")
    generated(page)
    page.locator(".cg-flow > span").nth(20).click()
    button = page.locator(".cg-details li button").first
    other = button.locator("b").inner_text()
    page.fill("#count", "10")
    button.click()
    text = generated(page, 10)
    assert text[:21] == greedy[:20] + other
    known = {symbols(c): c for c in model.tokenizer.vocabulary}
    prompt = "".join(known[c] for c in text[:21])
    assert text == symbols(model.generate(prompt, 10, temperature=0)[0].text)


def test_keyboard_alone_writes_and_branches(page, greedy):
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    generated(page)
    page.focus("#clear")
    page.keyboard.press("Tab")
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    while page.evaluate("document.activeElement.closest('.cg-details') === null"):
        page.keyboard.press("Tab")
    other = page.evaluate("document.activeElement.querySelector('b').textContent")
    page.keyboard.press("Enter")
    assert generated(page)[:9] == greedy[:8] + other
    assert page.evaluate("document.activeElement.classList.contains('cg-flow')")


def test_stop_and_clear_work_while_generating(page):
    page.fill("#count", "20000")
    page.click("#write")
    page.wait_for_selector(".cg-flow > span:nth-child(50)")
    page.click("#stop")
    length = len(shown(page))
    assert page.inner_text("#status") == "Stopped."
    page.wait_for_timeout(100)
    assert len(shown(page)) == length < 20_000
    page.click("#continue")
    page.wait_for_selector(f".cg-flow > span:nth-child({length + 50})")
    page.click("#clear")
    assert shown(page) == ""
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.is_disabled("#continue")
    assert page.is_disabled("#clear")


def test_click_while_a_prompt_is_read_branches(page):
    page.fill("#prompt", "ab c" * 4_900)
    page.click("#write")
    page.locator(".cg-flow > span").nth(9).click()
    other = page.locator(".cg-details li button b").first.inner_text()
    page.locator(".cg-details li button").first.click()
    assert generated(page)[:10] == "ab cab ca" + other
    page.click("#write")
    page.click("#stop")
    assert shown(page) == ""
    assert page.inner_text("#status") == "Stopped before the prompt was read."


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("#prompt", "", "The prompt is empty"),
        ("#prompt", "abQ\u0416", "The prompt has “Q” (U+0051), “Ж” (U+0416), not in the vocabulary of the model"),
        ("#prompt", "a" * 20_001, "has 20,001 characters, but 20,000 is the maximum"),
        ("#count", "0", "must be a whole number from 1 to 20,000"),
        ("#count", "1.5", "must be a whole number from 1 to 20,000"),
        ("#top-k", "0", "Top-k must be"),
        ("#seed", "-1", "The seed must be"),
    ],
    ids=["empty", "unknown", "long", "no character", "half a character", "top-k", "seed"],
)
def test_mistake_gets_a_sentence_and_leaves_the_text(page, field, value, words):
    page.fill("#count", "5")
    page.click("#write")
    before = generated(page, 5)
    page.fill(field, value)
    page.click("#write")
    assert words in page.inner_text("#problem")
    assert shown(page) == before
    assert page.input_value(field) == value


def test_seed_repeats_a_text_in_a_browser(page):
    page.fill("#count", "60")
    page.locator("#temperature").fill("1.5")
    texts = []
    for seed in ("5", "6", "5"):
        page.fill("#seed", seed)
        page.click("#write")
        page.wait_for_selector(f"#status:has-text('seed {seed}.')")
        texts.append(generated(page, 60))
    assert texts[0] == texts[2] != texts[1]


def test_text_of_a_model_is_shown_as_text(browser, tmp_path):
    name = "</script><img src=x onerror=alert(1)><b>bold</b>"
    model = random_model(vocabulary="</script>=&\"' \u2028\0\ud800")
    model.config.sample.prompts, model.config.sample.max_new_tokens = ("<script>",), 30
    about = About(name, 1, None, ["<i>title</i>"])
    out = tmp_path / "page.html"
    convert.export("html", model.config, model.tokenizer, model.params, out, print, about)
    with opened(browser, out) as page:
        page.click("#write")
        assert generated(page, 30).startswith("<script>")
        assert page.inner_text("h1") == name
        assert "<i>title</i>" in page.inner_text("#facts")
        assert page.locator("img, h1 b, dd i, .cg-flow script").count() == 0


def test_damaged_page_gives_a_sentence(browser, path, tmp_path):
    text = path.read_text(encoding="utf-8")
    start = text.index('id="parameters">') + len('id="parameters">')
    (tmp_path / "page.html").write_text(text[:start] + text[start + 400 :], encoding="utf-8")
    with opened(browser, tmp_path / "page.html") as page:
        assert "it has 5429 values, but must have 5504" in page.inner_text("#what")
        assert page.is_hidden("#form")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.fill("#count", "200")
    page.click("#write")
    generated(page, 200)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    red = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])")
    assert (red < 64) == (scheme == "dark")
