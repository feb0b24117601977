"""Links between the pages lead somewhere, all pages can be found, and what pages and code name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pages import DOCS, PAGES, ROOT, anchors, text_of, without_blocks

OTHER_PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
ALL_PAGES = [*PAGES, *OTHER_PAGES, *sorted(ROOT.glob("examples/**/*.md"))]


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(page))


def target_of(page: Path, link: str) -> Path:
    path = link.partition("#")[0]
    return (page.parent / path).resolve() if path else page


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    wrong = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, anchor = target_of(page, link), link.partition("#")[2]
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_the_index_has_every_page_and_the_readme_leads_to_it():
    index = DOCS / "README.md"
    assert {target_of(index, link) for link in links(index)} >= set(DOCS.glob("*.md")) - {index}
    assert index in {target_of(ROOT / "README.md", link) for link in links(ROOT / "README.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:nnunet_cil|trainers|plans|tests|docs|examples|benchmarks)/[\w./-]*)`", text_of(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page):
    for file, test in re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", text_of(page)):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_pages_and_sections_that_the_code_names_are_there():
    code = [path for folder in ("nnunet_cil", "trainers", "plans") for path in (ROOT / folder).rglob("*.*")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in code if path.suffix in (".py", ".yaml"))
    named = set(re.findall(r"docs/[\w-]+\.md", text))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []
    sections = set(re.findall(r"docs/method\.md, section (\d+)", text))
    assert sections
    assert [n for n in sections if f"\n## {n}. " not in text_of(DOCS / "method.md")] == []
