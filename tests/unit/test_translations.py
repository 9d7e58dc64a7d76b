"""A Chinese page has the code, the messages, the sections and the links of its English page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.support.documents import anchors, headings, links, prose, without_code_blocks

SUFFIX = "_CN.md"
CHINESE = sorted([*ROOT.glob(f"*{SUFFIX}"), *(ROOT / "docs").glob(f"*{SUFFIX}")])
DOCS = [page for page in CHINESE if page.parent.name == "docs"]


def english(page: Path) -> Path:
    """The English page of the same content: the page itself, if it is not a Chinese one."""
    return page.with_name(page.name.removesuffix(SUFFIX) + ".md") if page.name.endswith(SUFFIX) else page


def chinese(page: Path) -> Path:
    return page.with_name(page.stem + SUFFIX)


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


def code(page: Path) -> list[tuple[str, str]]:
    """(language, code) of each block; comments may be translated, output may not."""
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    comment = re.compile(r"(^|[ \t]+)#[ \t].*$", re.MULTILINE)
    return [(language, text if language == "text" else comment.sub("", text)) for language, text in found]


def sections(page: Path) -> list[str]:
    """What comes before the first heading, and what each heading begins, without code blocks."""
    return re.split(r"^(?=#+ )", without_code_blocks(page), flags=re.MULTILINE)


def terms(section: str) -> Counter[str]:
    """What no translation changes: code within sentences, and numbers."""
    spans = [span for _, span in re.findall(r"(`+)(.+?)\1", section)]
    sentences = re.sub(r"(`+).+?\1|\]\(.*?\)", "", section)
    return Counter([*spans, *re.findall(r"\d+(?:[.,]\d+)*", sentences)])


def targets(page: Path) -> Iterator[tuple[Path, int]]:
    """Where each link in the repository leads: the English page or file, and the number of the heading in it."""
    for link in links(page):
        path, _, name = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        yield english(target), list(anchors(target)).index(name) if name else -1


def test_there_are_chinese_pages():
    assert {page.name for page in CHINESE} >= {"README_CN.md", "npu_server_CN.md", "troubleshooting_CN.md"}
    assert all(english(page).is_file() for page in CHINESE)


@each(CHINESE)
def test_code_is_the_same(page: Path):
    assert code(page) == code(english(page))


@each(CHINESE)
def test_sections_are_the_same(page: Path):
    """In number, order and depth. What begins with code is a message, which is not translated."""
    ours, theirs = headings(page), headings(english(page))
    assert [len(marks) for marks, _ in ours] == [len(marks) for marks, _ in theirs]
    assert [text for _, text in ours if text[0] == "`"] == [text for _, text in theirs if text[0] == "`"]
    for ours_in, theirs_in in zip(sections(page), sections(english(page)), strict=True):
        for line in (r"^\| ", r"^- ", r"^\d+\. "):
            assert len(re.findall(line, ours_in, re.MULTILINE)) == len(re.findall(line, theirs_in, re.MULTILINE))


@each(DOCS)
def test_code_within_sentences_and_numbers_are_the_same(page: Path):
    for ours, theirs in zip(sections(page), sections(english(page)), strict=True):
        assert terms(ours) == terms(theirs), ours.partition("\n")[0]


@each(CHINESE)
def test_links_lead_to_the_same_places(page: Path):
    """Every one of them exists on both sides, at the same heading."""
    assert Counter(targets(page)) == Counter(targets(english(page)))


@each(CHINESE)
def test_both_name_the_other_at_the_top(page: Path):
    for here, there in ((page, english(page)), (english(page), page)):
        top = re.split(r"^## ", prose(here), maxsplit=1, flags=re.MULTILINE)[0]
        assert f"]({there.name})" in top


@each(CHINESE)
def test_chinese_pages_link_to_chinese_pages(page: Path):
    named = [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if link[0] != "#"]
    assert [target.name for target in named if chinese(target).is_file()] == [english(page).name]
