"""docs/report.md names every part of the report and of the table."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest

from nnunet_cil.report.page import _SUMMARY
from nnunet_cil.report.table import FinalScores, Row, score_table
from nnunet_cil.report.words import status_words
from tests.pages import DOCS, ROOT, text_of
from tests.test_docs_messages import VALUE, text_in

PAGE = re.sub(r"\s+", " ", text_of(DOCS / "report.md"))
TITLED = {"FigureFile": 1, "table": 0, "details": 0}  # calls whose argument of this number is a title


def titles() -> list[str]:
    """Titles of figures, tables and folded parts, and the sections' names."""
    found = []
    for path in (ROOT / "nnunet_cil" / "report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in TITLED:
                found.append(text_in(node.args[TITLED[node.func.id]]))
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "titles":
                found += map(text_in, node.value.values)
    return sorted(set(found))


@pytest.mark.parametrize("title", titles())
def test_every_part_is_explained(title):
    parts = [part.strip(" :;") for part in title.split(VALUE)]
    assert [part for part in parts if part.lower() not in PAGE.lower()] == []


def test_every_column_of_the_table_is_explained():
    final = FinalScores(0.5, 2.0, 3.0, 4, 0, 0, 0, 0.1, 0.1)
    row = Row("pgcd", np.array([[[0.9, np.nan], [0.8, 0.7]]]), final=final)
    lines = score_table([row], ["liver", "spleen"], [1, 2]).splitlines()
    columns = {name for line in lines if line.startswith("method") for name in re.split(r"\s{2,}", line)}
    assert len(columns) > 15
    assert [name for name in columns - {"method", "liver", "spleen"} if f"| `{name}` |" not in PAGE] == []


def test_columns_of_the_page_are_explained():
    assert [name for name, _, _ in _SUMMARY.values() if name not in PAGE] == []


def test_words_for_organs_are_those_of_the_code():
    lines = [f"| {word} | {text} |" for word, text in status_words().items()]
    assert [line for line in lines if line not in PAGE] == []
