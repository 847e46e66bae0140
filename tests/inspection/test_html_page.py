"""Pages: escaped text, tables a browser can sort, and nothing that leads out of the file."""

import base64
import math
from html.parser import HTMLParser

import pytest

from inspection.html_page import Column, Section, key_figures, page, paragraph, picture, table

NASTY = "<script>alert(\"1\")</script> & 'x'"


class Tags(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each tag of that name."""
        return [attributes for name, attributes in self.tags if name == tag]


def test_text_from_outside_never_becomes_markup() -> None:
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (3).to_bytes(4, "big") + (2).to_bytes(4, "big")
    parts = [
        paragraph(NASTY, note=True),
        key_figures([(NASTY, NASTY)]),
        table(NASTY, [Column(NASTY)], [[NASTY]]),
        picture(png, NASTY, NASTY),
    ]
    plain = Tags(page("title", "", [Section("s", "")]))
    tags = Tags(page(NASTY, parts[0], [Section(NASTY, "".join(parts[1:]))]))
    assert len(tags.of("script")) == len(plain.of("script")) == 1
    assert tags.of("img")[0]["alt"] == NASTY
    assert tags.text.count(NASTY) == 11, "title, h1, link, h2, note, two figures, two captions, head, cell"


def test_table_marks_how_it_is_sorted_and_hides_no_missing_value() -> None:
    html = table(
        "t",
        [Column("name"), Column("n", ",.1f")],
        [["b", 1234.56], ["a", None], ["c", math.nan]],
        sorted_by=1,
    )
    tags = Tags(html)
    assert [head.get("aria-sort") for head in tags.of("th")[:2]] == [None, "descending"]
    assert [cell.get("data-value") for cell in tags.of("td")] == ["1234.56", "", ""]
    assert "1,234.6" in tags.text
    assert len(tags.of("button")) == 2
    assert "data-sortable" in tags.of("table")[0]
    box = tags.of("div")[0]
    assert (box["tabindex"], box["role"]) == ("0", "region"), "the keyboard can scroll it"


def test_rows_that_do_not_fit_the_columns_are_refused() -> None:
    with pytest.raises(ValueError):
        table("t", [Column("a"), Column("b")], [["only one"]])


def test_picture_keeps_the_files_bytes_and_its_size() -> None:
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (300).to_bytes(4, "big") + (200).to_bytes(4, "big") + b"rest"
    image = Tags(picture(png, "alt", "caption", least_width_px=240)).of("img")[0]
    assert (image["width"], image["height"]) == ("300", "200")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == png
    assert "240px" in image["style"]


def test_page_links_lead_to_its_own_headings() -> None:
    tags = Tags(page("t", "", [Section("One", "<p>1</p>"), Section("Two", "")]))
    targets = [heading["id"] for heading in tags.of("h2")]
    assert [link["href"] for link in tags.of("a")] == [f"#{target}" for target in targets]
    assert len(tags.of("h1")) == 1 and tags.of("html")[0]["lang"] == "en"
    policy = next(meta["content"] for meta in tags.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
