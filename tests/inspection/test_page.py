from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

import memlayer
from memlayer.errors import DataError
from memlayer.inspection import inspect_prompt, render_page, write_page


class Parts(HTMLParser):
    """Notes every tag, and the text of script and title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "title": []}
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in self.texts:
            self.texts[self._inside].append(data)


@pytest.fixture
def parts(inspection):
    return Parts(render_page(inspection))


@pytest.fixture
def data(parts):
    return json.loads(parts.texts["script"][0])


def test_the_page_holds_the_inspection(data, inspection):
    assert data["version"] == memlayer.__version__
    assert [token["text"] for token in data["tokens"]] == [t.text for t in inspection.tokens]
    token, shown = inspection.tokens[3], data["tokens"][3]
    assert shown["gain"] == pytest.approx(token.gain, rel=1e-4)
    chunk, weight, heads = shown["reads"][0]
    read = token.reads[0]
    assert (chunk, weight) == (read.chunk, pytest.approx(read.weight, rel=1e-4))
    assert heads[0][:2] == [read.heads[0].layer, read.heads[0].head]
    assert {int(name) for name in data["chunks"]} == {p.chunks[0] for p in inspection.chunks}
    assert data["passages"][0]["text"] == inspection.passages[0].text


def test_the_page_asks_for_nothing(parts, inspection):
    for tag, attributes in parts.tags:
        assert tag not in ("iframe", "object", "embed", "img", "audio", "video", "base", "form")
        assert "src" not in attributes
        assert attributes.get("href") in (None, "data:,")
    page = render_page(inspection)
    template = page.replace(parts.texts["script"][0], "")
    assert not re.search(r"https?:|//\w|@import|url\(|fetch\(|XMLHttp|import\(|eval\(", template)
    (policy,) = (
        attributes["content"]
        for tag, attributes in parts.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")


def test_what_a_document_says_is_data_and_no_markup(
    make_model, remember, tiny_backbone, inspection
):
    evil = "</script><script>alert(1)</script><!-- <b>&amp; \u2028 {{data}} "
    model = make_model(segment_length=128)
    remember(model, evil, document="</script><img src=x onerror=alert(2)>")
    found = inspect_prompt(model, tiny_backbone.tokenizer, evil)
    page = render_page(found)
    dangerous = Parts(page)
    harmless = Parts(render_page(inspection))
    assert dangerous.tags == harmless.tags
    text = dangerous.texts["script"][0]
    assert not set("<>&\u2028\u2029") & set(text)
    data = json.loads(text)
    assert "".join(token["text"] for token in data["tokens"]) == evil
    assert data["memory"]["documents"] == ["</script><img src=x onerror=alert(2)>"]
    (title,) = dangerous.texts["title"]
    assert title.startswith("</script><script>alert(1)</script><!-- <b>&amp; {{data}}")


def test_the_title_is_the_prompts_beginning(parts, make_model, tiny_backbone, prompt):
    assert parts.texts["title"] == [f"{prompt} · memlayer inspect"]
    long = inspect_prompt(make_model(segment_length=128), tiny_backbone.tokenizer, "word\n " * 20)
    (title,) = Parts(render_page(long)).texts["title"]
    assert title == "word " * 11 + "word… · memlayer inspect"


def test_every_control_of_the_page_has_a_name(parts):
    ids = {attributes["id"] for _, attributes in parts.tags if "id" in attributes}
    for tag, attributes in parts.tags:
        if tag in ("section", "aside", "fieldset", "canvas"):
            assert attributes.get("aria-label") or attributes.get("aria-labelledby") in ids
    assert ("html", {"lang": "en"}) in parts.tags


def test_write_page_writes_one_file(inspection, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    write_page(inspection, path)
    assert path.read_text(encoding="utf-8") == render_page(inspection)
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(inspection, tmp_path):
    with pytest.raises(DataError, match="is a folder, not a file"):
        write_page(inspection, tmp_path)
    with pytest.raises(DataError, match=r"there is no folder .*absent for the page"):
        write_page(inspection, tmp_path / "absent" / "page.html")
    with pytest.raises(DataError, match="cannot be written: File name too long"):
        write_page(inspection, tmp_path / ("x" * 300))
    assert list(tmp_path.iterdir()) == []


def test_nothing_read_gives_a_page_too(make_model, tiny_backbone):
    found = inspect_prompt(make_model(), tiny_backbone.tokenizer, "x")
    data = json.loads(Parts(render_page(found)).texts["script"][0])
    assert data["passages"] == []
    assert data["tokens"][0]["gain"] is None
