"""Write the report of a chain: figures as PNG and PDF, and one page of HTML that holds them all."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from nnunet_cil.chain import Chain, Variant
from nnunet_cil.report.collect import Collected, collect
from nnunet_cil.report.gallery import draw_all
from nnunet_cil.report.page import page

logger = logging.getLogger(__name__)

MAX_BYTES = 10_000_000
_SCALES = (1.0, 0.7, 0.5, 0.35, 0.25)  # of the figures, until the page is small enough


def write_report(chain: Chain, variants: Sequence[Variant]) -> Path:
    """Write ``report.html`` and ``figures/`` into the chain's folder, from files alone; what is missing is left out.

    Args:
        chain: the chain.
        variants: methods with seeds, in the order to show.

    Returns:
        The page, below 10 MB, whole or not at all.
    """
    found = collect(chain, variants)
    shelves = draw_all(found, chain.folder / "figures")
    for scale in _SCALES:
        content = page(found, shelves, _commands(found), scale).encode()
        if len(content) < MAX_BYTES:
            break
        logger.info("%.1f MB with figures at %.2f of their size: taking smaller ones", len(content) / 1e6, scale)
    path = chain.folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    os.replace(partial, path)
    return path


def _commands(found: Collected) -> list[str]:
    """One line for the seeds that have the same methods; the report then takes all that there is."""
    methods: dict[int | None, dict[str, None]] = {}
    for run in found.runs:
        methods.setdefault(run.seed, {})[run.method] = None
    seeds: dict[tuple[str, ...], list[str]] = {}
    for seed, names in methods.items():
        seeds.setdefault(tuple(names), []).extend([] if seed is None else [str(seed)])
    lines = []
    for names, numbers in seeds.items():
        chosen = ["--methods", *names, *(["--seeds", *numbers] if numbers else [])]
        lines.append(["nnunet-cil", "run", found.schedule_file.name, *chosen])
    report = ["nnunet-cil", "report", found.schedule_file.name, *(lines[0][3:] if len(lines) == 1 else [])]
    return [shlex.join(line) for line in (*lines, report)]
