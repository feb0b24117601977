"""docs/troubleshooting.md and the list in docs/schedule.md have every message that a user can meet, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.pages import DOCS, ROOT, text_of

VALUE = "\0"  # stands for an inserted value
FOREIGN = "## Messages of nnU-Net and of the system"
EXCLUDED = "## Messages that are not here"
PAGE, FOREIGN_PART, EXCLUDED_PART = re.split(
    f"^{FOREIGN}$|^{EXCLUDED}$", text_of(DOCS / "troubleshooting.md"), flags=re.M
)
SCHEDULE_PART = text_of(DOCS / "schedule.md").split("\n## Error messages\n")[1]
EMPTY_WORDS = {"got", "expected", "no"}


@dataclass(frozen=True)
class Message:
    """A text that the package may show, with ``VALUE`` for each inserted value."""

    module: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.text.replace(VALUE, '{}')!r}"


def text_in(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(text_in(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_in(node.left) + text_in(node.right)
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "join" and isinstance(node.args[0], ast.List):
        return "\n".join(map(text_in, node.args[0].elts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else VALUE


def texts_of(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Messages below a node: what is raised, a schedule's problems, warnings, and all else that says what was got."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield from ((node.lineno, text_in(argument)) for argument in node.exc.args)
        return
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "problem":
        key, got, expected = map(text_in, node.args)
        yield node.lineno, f"{key}: got {got}, expected {expected}."
        return
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warning":
        yield node.lineno, re.sub(r"%[.\d]*[a-z]", VALUE, text_in(node.args[0]))
        return
    if isinstance(node, (ast.JoinedStr, ast.Constant)):
        if re.search(r"\bgot\b", text := text_in(node)):
            yield node.lineno, text
        return
    for child in ast.iter_child_nodes(node):
        yield from texts_of(child)


def messages() -> list[Message]:
    """All that have words of their own, not only those of another message or of a key."""
    found = []
    for path in sorted([*(ROOT / "nnunet_cil").rglob("*.py"), *(ROOT / "trainers").glob("*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for line, text in texts_of(ast.parse(path.read_text(encoding="utf-8"))):
            words = re.findall("[A-Za-z]{2,}", text)
            if len(words) > 1 and set(words) - EMPTY_WORDS:
                found.append(Message(module, line, text))
    return found


@dataclass(frozen=True)
class Row:
    """A quoted message, three dots for what differs, and the section that it stands in."""

    section: str
    pattern: str

    def fits(self, message: Message) -> bool:
        """Rows of the section *convert* are for its messages only, as many of them are short."""
        if self.section == "convert" and not message.module.startswith("nnunet_cil.convert"):
            return False
        parts = [re.escape(part) for part in self.pattern.split("...")]
        return re.search(".*".join(parts), message.text.replace("\n", " ")) is not None


def rows(part: str) -> list[Row]:
    """What the points of a list quote before their colon; a quoted message may go over two lines."""
    found = []
    for section in re.split("^## ", part, flags=re.MULTILINE):
        for point in re.findall(r"^- (.*(?:\n  .*)*)", section, re.MULTILINE):
            quoted = re.match(r"(?:`[^`]*`(?:, | or |,\n  |\n  or )?)+", point)
            texts = re.findall("`([^`]*)`", quoted[0]) if quoted else []
            found += [Row(section.partition("\n")[0], re.sub(r"\s+", " ", text)) for text in texts]
    return found


MESSAGES = messages()
OWN, OF_SCHEDULES = rows(PAGE), rows(SCHEDULE_PART)
NOT_LISTED = re.findall(r"`(nnunet_cil[\w.]+)`", EXCLUDED_PART)


def test_messages_are_found():
    assert len(MESSAGES) > 200
    assert {message.module.split(".")[1] for message in MESSAGES} >= {"schedule", "convert", "trainer", "cli", "chain"}
    assert len(OWN) > 100


@pytest.mark.parametrize("module", sorted({message.module for message in MESSAGES} - set(NOT_LISTED)))
def test_every_message_is_on_a_page(module):
    found = [message for message in MESSAGES if message.module == module]
    assert [str(message) for message in found if not any(row.fits(message) for row in [*OWN, *OF_SCHEDULES])] == []


@pytest.mark.parametrize("row", OWN, ids=lambda row: row.pattern)
def test_every_quoted_message_is_one_of_the_code(row):
    assert set(re.findall("[A-Za-z]{2,}", row.pattern)) - EMPTY_WORDS, "it fits any message"
    assert any(row.fits(message) for message in MESSAGES if message.module not in NOT_LISTED)


def test_modules_that_are_left_out_have_messages():
    assert [name for name in NOT_LISTED if name not in {message.module for message in MESSAGES}] == []


def test_messages_of_nnunet_are_those_of_nnunet():
    quoted = [row.pattern for row in rows(FOREIGN_PART)]
    assert quoted
    folders = [Path(find_spec(name).submodule_search_locations[0]) for name in ("nnunetv2", "batchgenerators")]
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    assert [text for text in quoted if text.split("...")[0].strip() not in code] == []
