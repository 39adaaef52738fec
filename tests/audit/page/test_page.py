"""The page of an audit: its structure, and how it behaves in headless Chromium."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lit_did.audit.page import render
from lit_did.audit.page.cells import cell, number, said, shown
from lit_did.audit.report import FLAGS, Estimate, Finding
from lit_did.audit.settings import Settings
from tests.audit.page.example import HOSTILE, example

CHROMIUM = Path("/usr/bin/chromium")
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Tree(HTMLParser):
    """What a test asks of the page: whether elements nest, ids, links, headings, texts and elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append((tag, named))
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named["href"]] if tag == "a" else []
        self.headings += [int(tag[1])] if re.fullmatch(r"h\d", tag) else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render(example())


@pytest.fixture(scope="module")
def tree(html) -> Tree:
    return Tree(html)


def test_elements_nest_ids_are_unique_and_links_lead_somewhere(tree):
    assert tree.open == []
    assert len(tree.ids) == len(set(tree.ids))
    inner = {link[1:] for link in tree.links if link.startswith("#")}
    assert inner <= set(tree.ids)
    assert {"rows-contradictions", "rows-unusable", "rows-side_of_margin"} <= inner
    outer = {link for link in tree.links if not link.startswith("#")}
    flags = {f"flags/{name}/flagged.jsonl" for name in ("contradictions", "unusable")}
    assert outer == {*flags, "pairs.csv", "audit.json"}
    assert tree.headings[0] == 1
    assert all(later - earlier <= 1 for earlier, later in zip(tree.headings, tree.headings[1:], strict=False))


def test_nothing_comes_from_elsewhere(html, tree):
    assert not [named for _, named in tree.tags if "src" in named]
    assert not re.search(r"@import|url\((?!#)", html)
    assert html.count("<script") == 2  # the data of the heat maps and ours
    assert html.count("default-src 'none'") == 1


def test_every_flag_is_listed_with_its_state(tree):
    rows = [named["class"] for tag, named in tree.tags if tag == "tr" and "class" in named]
    assert len(rows) == len(FLAGS)
    assert (rows.count("raised"), rows.count("not-raised")) == (2, 1)
    assert "Pass val to look for it." in tree.text


def test_settings_are_those_of_the_parts_that_ran():
    found = example()
    found.settings = Settings(beta=0.25, batch_size=3, by=("source",), tokenization={"max_length": 77}, device="cpu")

    def names(**inputs):
        found.inputs = {"pairs": "a", **inputs}
        text = render(found)
        settings = text[text.index("<summary>Settings") : text.index("</details>")]
        return re.findall(r"<dt>(\w+)</dt>", settings)

    assert names() == ["seed"]
    assert names(val="b", tokenizer="t") == ["max_length", "seed"]
    assert names(tokenizer="t", reference="r") == ["max_length", "batch_size", "seed", "device"]
    of_policy = ["max_length", "by", "beta", "batch_size", "num_prompts", "max_new_tokens", "seed", "device"]
    assert names(tokenizer="t", policy="r") == of_policy
    found.settings = replace(found.settings, sides=True)
    assert names(tokenizer="t", reference="r") == [name for name in of_policy if name != "by"]


def test_faults_without_a_place_in_the_verdict_are_linked():
    found = example()
    assert "more flag" not in render(found)
    found.parts["data"].findings += [
        Finding(name, "A.", "", True, 0.01, [1] * (name != "identical"))
        for name in ("identical", "duplicates", "habits", "leaked", "empty_think")
    ]
    text = render(found)
    more = text[text.index('<p class="more">') :].partition("</p>")[0]
    assert "And 3 more flags below:" in more
    links = re.findall('href="#(.*?)">(.*?)</a>', more)
    assert links == [("rows-leaked", "leaked"), ("rows-empty_think", "empty think"), ("rows-habits", "habits")]


def test_names_in_sentences_are_code():
    assert said("Pass `val` & `<b>`.") == "Pass <code>val</code> &amp; <code>&lt;b&gt;</code>."
    assert said("-3.2 (-5 to -.6) of a-1, 2026-11-29 and -KL") == "−3.2 (−5 to −.6) of a-1, 2026-11-29 and -KL"


@pytest.mark.parametrize(
    ("pairs", "title"), [("/a/b.jsonl", "b.jsonl"), ("org/name:train", "name:train"), ("a/b, c/d", "a/b, c/d")]
)
def test_the_title_is_short(pairs, title):
    found = example()
    found.inputs["pairs"] = pairs
    assert f"<h1>{title}</h1>" in render(found)


def test_an_audit_that_was_stopped():
    found = example()
    found.stopped = "an interrupt"
    found.inputs["val"] = "v.jsonl"
    text = " ".join(Tree(render(found)).text.split())
    assert "This audit is incomplete, without the part reference: an interrupt stopped it." in text
    assert text.count("not looked for The audit stopped before.") == len(FLAGS) - 3


def test_texts_are_shown_whole_or_cut_with_a_note(tree):
    assert tree.text.count("window.ran = true") > 10
    assert "998,000 more letters are cut on this page" in tree.text
    assert "U+202E" in tree.text
    assert "U+D800" in tree.text
    assert "row 7 How far is town 7?" in " ".join(tree.text.split())  # a row without evidence shows its beginning
    assert "20 more rows are in" in tree.text
    assert "empty" in tree.text  # why row 5 was refused
    assert "Intervals are over prompts." in tree.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (1234567, "1,234,567"),
        (0.12345, "0.123"),
        (-2.0, "−2"),
        (float("nan"), "–"),
        (1234.5, "1,234"),
        (1e-9, "1.0e−09"),
        (True, "yes"),
        ("<b>", "&lt;b&gt;"),
        (Estimate(0.5), "0.5"),
        (Estimate(0.5, 0.4, 0.6), '0.50<span class="interval"> 0.40 to 0.60</span>'),
    ],
)
def test_cells(value, expected):
    assert cell(value) == expected


def test_hidden_characters_are_written_out():
    assert shown("a\x00\u200bb\n\t") == 'a<span class="code">U+0000</span><span class="code">U+200B</span>b\n\t'
    assert number(float("-inf")) == "−∞"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with api.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, html, tmp_path):
    """Opens the page. At the end nothing may have gone wrong or have been loaded."""
    path = tmp_path / "audit.html"
    path.write_text(html, encoding="utf-8", errors="backslashreplace")
    problems, contexts = [], []

    def opened(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(path.as_uri()) or problems.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def test_links_of_the_verdict_land_on_their_rows(visit):
    page = visit()
    for details in page.query_selector_all("details.rows"):
        details.evaluate("element => { element.open = false }")
    for link in page.query_selector_all('.verdict a[href^="#"], nav a, .flags a[href^="#"]'):
        target = page.query_selector(link.get_attribute("href"))
        link.click()
        page.wait_for_timeout(50)
        box = target.bounding_box()
        assert target.is_visible()
        assert box["y"] < page.viewport_size["height"]
        assert target.evaluate("element => element.tagName !== 'DETAILS' || element.open")
    assert page.evaluate("window.ran") is None


def test_tables_sort_with_nothing_last(visit):
    page = visit()
    table = page.query_selector("table.sortable")

    def order(column, presses):
        button = table.query_selector(f"th:nth-child({column}) button")
        for _ in range(presses):
            button.press("Enter")
        state = table.query_selector(f"th:nth-child({column})").get_attribute("aria-sort")
        return state, [row.text_content()[:3] for row in table.query_selector_all("tbody th")]

    assert table.query_selector("th button").text_content() == "name"  # a header without a text gets one
    assert order(2, 1) == ("descending", ["bag", "lon", "<b>", "unk"])
    assert order(2, 1) == ("ascending", ["<b>", "lon", "bag", "unk"])
    assert order(3, 1) == ("descending", ["bag", "lon", "<b>", "unk"])
    assert order(4, 1) == ("ascending", ["<b>", "bag", "lon", "unk"])
    assert order(4, 1) == ("descending", ["lon", "bag", "<b>", "unk"])
    assert page.query_selector_all("table.sortable th[aria-sort]").__len__() == 1
    assert page.evaluate("[compare('a', null, 1), compare(null, 'a', -1), compare(1, null, -1)]") == [-1, 1, -1]


def test_tokens_tell_by_hover_focus_and_tap(visit):
    page = visit()
    tip, first = page.locator("#tip"), page.locator(".tokens > i").first
    assert not tip.is_visible()
    first.hover()
    assert "log-ratio (nats)" in tip.text_content()
    assert "</script>50.0%␣the20.0%⏎<0.1%" in tip.text_content()
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    first.focus()
    page.keyboard.press("ArrowRight")
    assert tip.is_visible()
    assert " nan" in tip.text_content()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.keyboard.press("Enter")  # pinned: the mouse does not change it
    page.locator(".tokens > i").nth(5).hover()
    assert " nan" in tip.text_content()
    page.keyboard.press("Escape")
    before = first.get_attribute("class")
    page.locator(".heat select").select_option("token DID entropy (nats)")
    assert first.get_attribute("class") != before
    assert page.locator(".scale.positive").count() == 1
    phone = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    phone.locator(".tokens > i").nth(4).tap()
    box = phone.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    phone.locator("h1").tap()
    assert not phone.locator("#tip").is_visible()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_scrolls_the_page(visit, width):
    page = visit(viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    headers = "[...document.querySelectorAll('thead th')].filter(th => th.scrollWidth > th.clientWidth + 1)"
    assert page.evaluate(f"{headers}.map(th => th.textContent)") == []


def test_dark_mode_and_print(visit):
    page = visit(color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(20, 23, 28)"
    closed = page.locator("details.pair").first
    assert not closed.locator(".texts").is_visible()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert closed.locator(".texts").is_visible()
    assert closed.evaluate("details => details.open")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert not closed.locator(".texts").is_visible()
    assert page.pdf()[:4] == b"%PDF"


def test_all_texts_are_there_without_javascript(visit):
    page = visit(java_script_enabled=False)
    shown_text = page.locator("main").text_content()
    assert HOSTILE[:30] in shown_text
    assert page.locator(".tokens > i.p5, .tokens > i.n5").count() > 0
    assert not page.locator("label.js").is_visible()
    assert page.locator("#rows-contradictions details.pair").first.is_visible()
