"""Small pieces of HTML, each a pure function. Every text that comes from outside is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from nnunet_cil.report.colours import BACKGROUND_COLOUR, OrganStyle, method_styles, organ_styles
from nnunet_cil.report.figures import DPI
from nnunet_cil.report.table import marked

PIXELS_PER_INCH = (78, 104)  # least, at which a figure's smallest letters can be read, and most
PHONE_PIXELS = 330  # that a phone's screen has for a figure

_MARKS = {
    "o": "●",
    "s": "■",
    "*": "★",
    "^": "▲",
    "D": "◆",
    "v": "▼",
    "P": "✚",
    "X": "✖",
    "<": "◀",
    "p": "⬟",
    "h": "⬢",
    ">": "▶",
    "d": "◆",
    "H": "⬢",
    "8": "●",
}
_CHIPS = {
    "kept": ("good", "✓"),
    "improved": ("good", "↑"),
    "learned": ("good", "+"),
    "weakened": ("warn", "↓"),
    "partly learned": ("warn", "~"),
    "lost": ("bad", "✕"),
    "not learned": ("bad", "✕"),
}


@dataclass(frozen=True)
class FigureFile:
    """A figure that is written, and what stands by it.

    Attributes:
        path: of the PNG; a PDF of the same name lies beside it.
        title: a few words.
        caption: one sentence that says what to look at.
        alt: what it shows, for who cannot see it.
        folded: shown only on demand, as it is one of many of its kind.
    """

    path: Path
    title: str
    caption: str
    alt: str
    folded: bool = False


def element(tag: str, content: str, **attributes: str) -> str:
    """An element: its content is HTML, its attributes are escaped. ``class_`` stands for class, ``a_b`` for a-b."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items() if value
    )
    return f"<{tag}{written}>{content}</{tag}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return element("p", escape(text), class_=kind)


def missing(sentences: Sequence[str]) -> str:
    """What is left out, and why."""
    return "".join(paragraph(sentence, "missing") for sentence in dict.fromkeys(sentences))


def scroller(content: str, label: str) -> str:
    """Content that may be wider than the page: it scrolls by itself, with the keyboard too."""
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def details(summary: str, content: str) -> str:
    """Content that is folded away."""
    return element("details", element("summary", escape(summary)) + content)


def section(name: str, title: str, content: str) -> str:
    """A section with its heading; ``name`` is its anchor."""
    heading = element("h2", escape(title), id=f"{name}-title")
    return element("section", heading + content, id=name, aria_labelledby=f"{name}-title")


def swatch(style: OrganStyle | None) -> str:
    """The square in an organ's colour; None is background."""
    if style is None:
        return f'<span class="swatch" style="background:{BACKGROUND_COLOUR}"></span>'
    fill = style.colour
    if style.hatch:
        fill = f"linear-gradient(90deg,{style.colour} 50%,#fff 50%)"
    return f'<span class="swatch" style="background:{fill}"></span>'


def organ(name: str, classes: Sequence[str]) -> str:
    """An organ's name after its colour."""
    return element("span", swatch(organ_styles(classes).get(name)) + escape(name), class_="name")


def method_name(name: str, methods: Sequence[str]) -> str:
    """A method's name after its marker among all ``methods``."""
    colour, marker = method_styles([name, *methods])[name]
    mark = element("span", _MARKS.get(marker, "●"), class_="mark", aria_hidden="true", style=f"color:{colour}")
    return mark + escape(marked(name))


def chip(status: str, count: int | None = None) -> str:
    """A status, with a count before it, as a coloured label with a sign, so that colour does not stand alone."""
    kind, sign = _CHIPS.get(status, ("none", "·"))
    text = status if count is None else f"{count} {status}"
    return element("span", f'<span aria-hidden="true">{sign}</span> {escape(text)}', class_=f"chip {kind}")


def table(caption: str, header: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself; cells are HTML, the first of each line heads it."""
    head = "".join(element("th", cell, scope="col") for cell in header)
    body = "".join(
        element("tr", element("th", line[0], scope="row") + "".join(element("td", cell) for cell in line[1:]))
        for line in lines
    )
    content = element("caption", escape(caption)) + element("thead", element("tr", head)) + element("tbody", body)
    return scroller(element("table", content, class_=kind), caption)


def code(text: str, label: str) -> str:
    """Preformatted text."""
    return element("pre", element("code", escape(text)), tabindex="0", role="region", aria_label=label)


def figure(file: FigureFile, number: int, scale: float = 1.0) -> str:
    """A figure with its caption and the names of its files; folded away if it is one of many."""
    source, width, height = embedded(file.path, scale)
    least, most = (round(width / (DPI * scale) * pixels) for pixels in PIXELS_PER_INCH)
    image = (
        f'<img src="{source}" width="{width}" height="{height}" alt="{escape(file.alt)}" '
        f'style="width:clamp({least}px,100%,{most}px)">'
    )
    swipe = element("span", " Swipe sideways to see all of it.", class_="swipe") if least > PHONE_PIXELS else ""
    name = file.path.stem
    caption = (
        f"<strong>Figure {number}. {escape(file.title)}.</strong> {escape(file.caption)}{swipe} "
        f'<span class="files">figures/{escape(name)}.png, .pdf</span>'
    )
    content = scroller(image, f"Figure {number}") + element("figcaption", caption)
    whole = element("figure", content)
    return details(file.title, whole) if file.folded else whole


def embedded(path: Path, scale: float = 1.0) -> tuple[str, int, int]:
    """A PNG as data address, its width and height in pixels.

    Args:
        path: the PNG.
        scale: of its size.
    """
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        size = image.size
        if scale != 1:
            size = tuple(max(1, round(side * scale)) for side in image.size)
            smaller = io.BytesIO()
            image.convert("RGB").resize(size).save(smaller, "PNG", optimize=True)
            content = smaller.getvalue()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}", *size
