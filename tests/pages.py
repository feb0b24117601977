"""The Markdown pages that users read, and what the tests of them need: code blocks, headings, links."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
_FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with its language and number on the page, from 1."""

    page: Path
    number: int
    language: str
    text: str

    @property
    def title(self) -> str:
        """Its first line, by which tests name it."""
        return self.text.splitlines()[0]

    def __str__(self) -> str:
        return f"{self.page.name}, block {self.number}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page, all or those of some languages."""
    found = [Block(page, n, m[1], m[2]) for n, m in enumerate(_FENCE.finditer(text_of(page)), 1)]
    return [block for block in found if not languages or block.language in languages]


def without_blocks(page: Path) -> str:
    return _FENCE.sub("", text_of(page))


def anchors(page: Path) -> set[str]:
    """What ``#...`` of a link may lead to, by GitHub's rule."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found
