"""The report as one page of HTML that needs nothing but itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape

import numpy as np
import yaml

from nnunet_cil import metrics
from nnunet_cil.chain import JOINT
from nnunet_cil.report import provenance
from nnunet_cil.report.collect import Collected, Model, last_scores, total_seconds
from nnunet_cil.report.colours import method_styles
from nnunet_cil.report.gallery import Shelf
from nnunet_cil.report.paired import labelled_by_seed
from nnunet_cil.report.parts import (
    chip,
    code,
    details,
    element,
    figure,
    method_name,
    missing,
    organ,
    paragraph,
    section,
    table,
)
from nnunet_cil.report.style import STYLE
from nnunet_cil.report.table import Row, hundredths, marked, named_seeds, seed_numbers
from nnunet_cil.report.words import (
    Outcome,
    against_joint,
    counted,
    fate_of_new,
    fate_of_old,
    last_scored_step,
    listed,
    lost_with_some,
    method_words,
    outcomes,
    status_words,
)

_CARDS_WITH_ORGANS = 4  # methods; the organs of more stand in one table
_SUMMARY = {
    "old_mean": ("earlier organs", "%", True),
    "new_mean": ("new organs", "%", True),
    "mean": ("all organs", "%", True),
    "average_incremental_mean": ("all steps", "%", True),
    "forgetting": ("forgetting", "points", False),
    "backward_transfer": ("change since learned", "points", True),
    "plasticity": ("when just learned", "%", True),
}
_GLOSSARY = {
    "Dice": "How well a model's outline of an organ overlaps the expert's: 0 is not at all, 100 is the same.",
    "HD95": "95th percentile of the distances between the two outlines, in mm: 0 is best. It does not exist where an "
    "organ was not found at all.",
    "NSD": "Share of the outlines that lie within a tolerance of each other: 100 is best.",
    "Step": "One round of training, which learns new organs; the labels of earlier organs are not there any more.",
    "Earlier organs, new organs": "Mean Dice after the last step over the organs of the steps before it, and over "
    "those of the last step.",
    "All steps": "Mean, over all steps, of the mean Dice over the organs learned so far.",
    "Forgetting": "Points of Dice that an organ has fallen from its best score before the last step; low is good.",
    "Change since learned": "Dice after the last step minus Dice when the organ was just learned (backward transfer).",
    "When just learned": "Mean Dice of the organs of steps 2 and later, each when just learned (plasticity).",
    "Test subject": "A person whose scans no step of this chain has been trained on. Every score comes from them.",
    "Seed": "The number from which chance starts in a training; several show how much a result varies.",
    "Prototype": "The average of the network's features over all voxels of an organ.",
}


def page(found: Collected, shelves: Mapping[str, Shelf], commands: Sequence[str], scale: float = 1.0) -> str:
    """The whole page.

    Args:
        found: what the report shows.
        shelves: from `gallery.draw_all`.
        commands: lines that make these results and this report anew.
        scale: of the figures, below 1 for a smaller file.
    """
    numbers = iter(range(1, 1000))
    titles = {
        "summary": "In short",
        "numbers": "Scores",
        "scores": "Step by step",
        "subjects": "Subjects",
        "pictures": "Pictures",
        "training": "Training",
        "prototypes": "Prototypes",
        "made": "How this was made",
    }
    bodies = {
        "summary": _summary(found),
        "numbers": _numbers(found),
        **{
            name: "".join(figure(file, next(numbers), scale) for file in shelf.figures) + missing(shelf.missing)
            for name, shelf in shelves.items()
        },
        "made": _made(found, commands),
    }
    contents = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in titles.items())
    sections = "".join(section(name, title, bodies[name]) for name, title in titles.items())
    name = escape(found.name)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}: learning organs step by step</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<p class="kicker">Report of nnunet-cil</p>
<h1>{name}</h1>
{paragraph(_lead(found), "lead")}
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<main id="main" tabindex="-1">
{sections}
</main>
<footer><p>Written on {datetime.now(timezone.utc):%Y-%m-%d} by nnunet-cil. Research software, not for clinical use.</p>
</footer>
</body>
</html>
"""


def _lead(found: Collected) -> str:
    n_test = len(found.test.get("cases", {}))
    seeds = {method: len({run.seed for run in found.runs if run.method == method}) for method in found.methods}
    fewest, most = min(seeds.values(), default=0), max(seeds.values(), default=0)
    each = counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
    parts = [
        f"A network learned {counted(len(found.classes), 'organ')} in {counted(found.n_steps, 'step')}.",
        (f"{len(found.methods)} methods are compared" if len(found.methods) > 1 else "One method is tested")
        + (f" on {counted(n_test, 'test subject')}" if n_test else "")
        + (f", with {each} each" if most else "")
        + ".",
    ]
    scored = sum(model.scores is not None for model in found.models)
    if scored < len(found.models):
        parts.append(f"This is not finished: {scored} of {len(found.models)} models are scored so far.")
    return " ".join(parts)


def _summary(found: Collected) -> str:
    by_step = [
        f"Step {t}: "
        + ", ".join(organ(c, found.classes) for c, at in zip(found.classes, found.learned_at, strict=True) if at == t)
        for t in range(1, found.n_steps + 1)
    ]
    order = element("ol", "".join(element("li", step) for step in by_step), class_="order")
    if not found.rows:
        nothing = missing(["Nothing is scored yet, so there is nothing to tell. `nnunet-cil run` goes on."])
        return order + _checked_steps(found) + nothing
    rows = {row.method: row for row in found.rows}
    by_method = {
        method: outcomes(row.dice, found.classes, found.learned_at, found.guard)
        for method, row in rows.items()
        if not row.is_joint
    }
    joint = rows.get(JOINT)
    many = len(by_method) > _CARDS_WITH_ORGANS
    cards = [_card(rows[method], what, found, many) for method, what in by_method.items()]
    cards += [_joint_card(joint, found, many)] if joint else []
    brief = _organ_table(by_method, joint, found) if many else ""
    words = "".join(
        f"<dt>{chip(status)}</dt><dd>{escape(text)}.</dd>" for status, text in status_words(found.guard).items()
    )
    return "".join(
        [
            _headline(by_method, rows, found),
            order,
            element("div", "".join(cards), class_="cards"),
            brief,
            paragraph(
                "Numbers are Dice, from 0 (not found) to 100 (same outline as the expert's): when the organ was just "
                f"learned → after the last step; means over {_means_over(found)}. A few points of difference can be "
                "chance: see the figures.",
                "quiet",
            ),
            _checked_steps(found),
            details("When an organ counts as kept, weakened or lost", f"<dl>{words}</dl>"),
            details(
                "Words used in this report",
                element("dl", "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _GLOSSARY.items())),
            ),
        ]
    )


def _checked_steps(found: Collected) -> str:
    """What each step did to the organs before it, folded away; "" where no step was compared with the one before."""
    lines = [
        [
            f"{method_name(check.method, found.methods)}, step {check.step} "
            f"<small>{escape(f'seed {check.seed}, fold {check.fold}')}</small>",
            escape(fate_of_old(check.outcomes(found.guard)) or "not scored"),
            escape(check.judged_by),
        ]
        for check in found.checks
    ]
    if not lines:
        return ""
    content = table("Each step compared with the step before", ["model", "earlier organs", "judged by"], lines, "text")
    return details("What each step did to the organs before it", content)


def _means_over(found: Collected) -> str:
    n_test, n_seeds = len(found.test.get("cases", {})), max(len(row.seeds) for row in found.rows)
    subjects = counted(n_test, "test subject") if n_test else "the test subjects"
    return subjects + (f" and up to {n_seeds} seeds" if n_seeds > 1 else "")


def _headline(by_method: Mapping[str, Sequence[Outcome]], rows: Mapping[str, Row], found: Collected) -> str:
    lines = []
    for method, what in by_method.items():
        some = lost_with_some(rows[method].by_seed, what, found.guard)
        fates = [fate for fate in (fate_of_old(what), fate_of_new(what), some) if fate]
        if fates:
            lines.append(element("li", f"<strong>{escape(marked(method))}</strong> {escape('; it '.join(fates))}."))
    return element("ul", "".join(lines), class_="lead") if lines else ""


def _numbers_of(o: Outcome) -> str:
    if o.status == "still to come":
        return ""
    return _hundred(o.after) if math.isnan(o.before) else f"{_hundred(o.before)} → {_hundred(o.after)}"


def _card(row: Row, what: Sequence[Outcome], found: Collected, brief: bool) -> str:
    last = last_scored_step(row.dice)
    beside = against_joint(row.final.gap_to_joint) if row.final else ""
    if beside and len(row.final.gap_seeds) < len(row.seeds):
        beside += f" ({named_seeds(row.final.gap_seeds)} alone)"
    so_far = "" if last == len(row.dice) else f" after step {last} of {len(row.dice)}"
    statuses = [o.status for o in what]
    counts = "".join(f"{chip(s, statuses.count(s))} " for s in status_words() if s in statuses)
    lines = [[organ(o.organ, found.classes), chip(o.status), _numbers_of(o)] for o in what]
    return _article(
        row, last, so_far + (f", {beside}" if beside else ""), counts if brief else _organ_list(lines), found
    )


def _joint_card(row: Row, found: Collected, brief: bool) -> str:
    values = zip(found.classes, row.dice[-1].tolist(), strict=True)
    lines = [[organ(name, found.classes), "", _hundred(value)] for name, value in values]
    return _article(row, len(row.dice), "", "" if brief else _organ_list(lines), found)


def _organ_list(lines: Sequence[Sequence[str]]) -> str:
    return element(
        "ul",
        "".join(
            element("li", element("span", name, class_="organ") + status + element("span", value, class_="numbers"))
            for name, status, value in lines
        ),
    )


def _article(row: Row, step: int, beside: str, content: str, found: Collected) -> str:
    mean = _hundred(metrics.mean(row.dice, found.learned_at, step))
    head = (
        element("h3", method_name(row.method, found.methods))
        + paragraph(_words_on(row.method, found), "quiet")
        + element("p", f'<span class="big">{mean}</span> mean Dice{escape(beside)}')
    )
    accent = f"--accent:{method_styles([row.method, *found.methods])[row.method][0]}"
    return element("article", head + content, class_="card", style=accent)


def _organ_table(by_method: Mapping[str, Sequence[Outcome]], joint: Row | None, found: Collected) -> str:
    """What became of each organ under each method, where cards would be too long: the fewer of both are columns."""
    lines = [["method", *(organ(name, found.classes) for name in found.classes)]]
    for method, what in by_method.items():
        cells = (f"{chip(o.status)}<br><small>{_numbers_of(o)}</small>" for o in what)
        lines.append([method_name(method, found.methods), *cells])
    if joint:
        lines.append([method_name(JOINT, found.methods), *map(_hundred, joint.dice[-1].tolist())])
    if len(lines) <= len(found.classes):
        lines[0][0] = "organ"
        lines = [list(cells) for cells in zip(*lines, strict=True)]
    return table("What became of each organ", lines[0], lines[1:])


def _words_on(method: str, found: Collected) -> str:
    settings = found.own_settings.get(method, {})
    own = ", ".join(f"{key} {str(v).lower() if isinstance(v, bool) else v}" for key, v in settings.items())
    base = found.base_methods.get(method, method)
    words = method_words(method) or ("The schedule's method" if base == found.own_method else method_words(base))
    return f"{words}, with {own}" if own and words and not method_words(method) else words


def _hundred(value: float, spread: float = math.nan, sign: str = "") -> str:
    text = hundredths(value, sign)
    return text if math.isnan(value) or math.isnan(spread) else f"{text} <small>±{100 * spread:.1f}</small>"


def _numbers(found: Collected) -> str:
    if not found.rows:
        return missing(["Nothing is scored yet."])
    by_step = []
    for row in found.rows:
        lines = []
        for t in np.flatnonzero(~np.isnan(row.dice).all(1)).tolist():
            mean = _hundred(metrics.mean(row.dice, found.learned_at, t + 1))
            lines.append([f"{t + 1}", *(_cell(row, t, c, found) for c in range(len(found.classes))), mean])
        header = ["step", *(organ(name, found.classes) for name in found.classes), "all organs"]
        by_step.append(table(f"{marked(row.method)}: Dice (%) by step", header, lines))
    tables = [
        _last_table(found),
        _test_set_table(found),
        _beside_table(found),
        _paired_table(found),
        _surface_table(found),
        _cost_table(found),
    ]
    return "".join([*tables, details("Dice after every step", "".join(by_step))])


def _cell(row: Row, t: int, c: int, found: Collected) -> str:
    if found.learned_at[c] > t + 1:
        return ""
    return _hundred(row.dice[t, c], row.dice_std[t, c])


def _last_table(found: Collected) -> str:
    """Dice of each organ after the last step, and the scores of the chain; the best method of each column is bold."""
    compared = _compared(found.rows)
    summaries = [row.summary(found.learned_at) for row in found.rows]
    pairs = list(zip(found.rows, summaries, strict=True))
    organs = np.array([[*row.dice[-1], means["mean"]] for row, (means, _) in pairs])
    spreads = np.array([[*row.dice_std[-1], stds["mean"]] for row, (_, stds) in pairs])
    header = ["method", "seeds", *(f"{organ(name, found.classes)}<br><small>%</small>" for name in found.classes)]
    header.append("all organs<br><small>%</small>")
    lines = [
        [method_name(row.method, found.methods), seed_numbers(row.seeds), *cells]
        for row, cells in zip(
            found.rows, _cells(organs, np.full(organs.shape[1], True), compared, spreads), strict=True
        )
    ]
    note = _note_on_bold(found.rows, compared)
    if any(len(row.seeds) > 1 for row in found.rows):
        note += "±: standard deviation over seeds. "
    parts = [table("Dice of each organ after the last step", header, lines)]
    chain, chain_spreads = (np.array([[pair[i][key] for key in _SUMMARY] for pair in summaries]) for i in (0, 1))
    better = np.array([up for _, _, up in _SUMMARY.values()])
    header = ["method", *(f"{escape(name)}<br><small>{unit}</small>" for name, unit, _ in _SUMMARY.values())]
    lines = [
        [method_name(row.method, found.methods), *cells]
        for row, cells in zip(found.rows, _cells(chain, better, compared, chain_spreads), strict=True)
    ]
    parts.append(table("Keeping the old and learning the new", header, lines))
    return "".join(parts) + paragraph(note + "n/a: does not exist.", "quiet")


def _in_steps(rows: Sequence[Row]) -> list[int]:
    """Places of the methods that have come to their last step in several."""
    return [i for i, row in enumerate(rows) if not row.is_joint and not np.isnan(row.dice[-1]).all()]


def _compared(rows: Sequence[Row]) -> list[int]:
    """Places of the methods of which one can be the best: several with the same seeds, as many as there are."""
    groups: dict[frozenset[int | None], list[int]] = {}
    for i in _in_steps(rows):
        groups.setdefault(frozenset(rows[i].seeds), []).append(i)
    shared = [(seeds, places) for seeds, places in groups.items() if len(places) > 1]
    return max(shared, key=lambda group: (len(group[0]), len(group[1])), default=((), []))[1]


def _note_on_bold(rows: Sequence[Row], compared: Sequence[int]) -> str:
    in_steps = _in_steps(rows)
    if len(in_steps) < 2:
        return ""
    if not compared:
        return "Nothing is bold, as no two methods have the same seeds. "
    some = len(compared) < len(in_steps)
    which = f"with {named_seeds(rows[compared[0]].seeds)}" if some else "that learn step by step"
    return f"Bold: best of the methods {which}. "


def _cells(values: np.ndarray, better: np.ndarray, compared: Sequence[int], spreads: np.ndarray) -> list[list[str]]:
    """A table's numbers as text; the best of the compared lines in each column is bold."""
    best = _best(values[list(compared)], better) if compared else np.full(values.shape[1], np.nan)
    lines = []
    for i, line in enumerate(values):
        cells = []
        for j, value in enumerate(line.tolist()):
            text = _hundred(value, spreads[i, j])
            is_best = i in compared and round(value, 3) == round(best[j], 3)
            cells.append(element("strong", text) if is_best else text)
        lines.append(cells)
    return lines


def _best(values: np.ndarray, better: np.ndarray) -> np.ndarray:
    """(C,) the best of each column, the largest where ``better`` is true; NaN where there is none."""
    upright = np.where(better, values, -values)
    top = np.where(np.isnan(upright), -np.inf, upright).max(0)
    return np.where(np.isinf(top), np.nan, np.where(better, top, -top))


def _test_set_table(found: Collected) -> str:
    """Mean Dice by test set; "" where the scores have none."""
    if not found.by_test_set:
        return ""
    header = ["method"]
    for one in found.by_test_set:
        header.append(f"{escape(one.name)}<br><small>%, {', '.join(one.about(len(found.classes)))}</small>")
    lines = [
        [
            method_name(row.method, found.methods),
            *(_hundred(one.dice.get(row.method, math.nan)) for one in found.by_test_set),
        ]
        for row in found.rows
    ]
    return table("Mean Dice after the last step, by test set", header, lines)


def _beside_table(found: Collected) -> str:
    """How often an organ was missed or invented, and what joint training has more."""
    header = ["method", "missed", "invented", "absent in both", "of", "gap to joint", "gap when just learned"]
    header[5:] = [f"{name}<br><small>points</small>" for name in header[5:]]
    lines = []
    for row in found.rows:
        if (final := row.final) is not None:
            some = 0 < len(final.gap_seeds) < len(row.seeds)
            few = f" <small>({named_seeds(final.gap_seeds)})</small>" if some else ""
            gaps = [_hundred(gap, sign="+") for gap in (final.gap_to_joint, final.plasticity_gap)]
            counts = [str(n) for n in (final.missed, final.invented, final.both_empty, final.n_scores)]
            name = method_name(row.method, found.methods)
            lines.append([name, *counts, *(gap if gap == "n/a" else gap + few for gap in gaps)])
    note = (
        "Counted are subjects times organs times trainings. Missed: the expert has the organ, the model nothing; "
        "invented: the other way round; both have Dice 0 and no HD95. Gap: what joint training has more, after the "
        f"last step and when an organ was just learned. Forward transfer is n/a, as {metrics.NO_FORWARD_TRANSFER}."
    )
    return table("Organs missed or invented, and joint training", header, lines) + paragraph(note, "quiet")


def _paired_table(found: Collected) -> str:
    """Differences to the reference over the same subjects, with intervals; "" where there is nothing to compare."""
    reference = marked(found.paired.get("reference", ""))
    words = {"all": "all organs", "old": "earlier organs", "new": "new organs"}
    lines, notes = [], []
    for method, groups in found.paired.get("dice", {}).items():
        for group, entry in groups.items():
            p = math.nan if entry["p_value"] is None else entry["p_value"]
            mean = math.nan if entry["mean"] is None else entry["mean"]
            intervals = [_interval(entry["low"], entry["high"]), _interval(entry["wide_low"], entry["wide_high"])]
            p_text = "n/a" if math.isnan(p) else "&lt; 0.001" if p < 0.001 else f"{p:.3f}"
            name = f"{method_name(method, found.methods)}, {words.get(group, group)}"
            seeds = labelled_by_seed(entry["by_seed"], lambda value: _hundred(value, sign="+"))
            lines.append([name, _hundred(mean, sign="+"), *intervals, p_text, str(entry["n_subjects"]), seeds])
            if entry["note"]:
                notes.append(f"{marked(method)}, {words.get(group, group)}: {entry['note']}.")
    if not lines:
        return ""
    note = (
        f"Points of Dice more (+) or less (-) than {reference} after the last step, subject by subject. An interval "
        "that holds 0 can be chance. 95 % interval: what these trainings would differ by on other subjects; with few "
        "subjects it is too narrow (six: true in 88 of 100). Over trainings: the same of other subjects and trainings "
        "with other seeds, if there are several. p: Wilcoxon signed-rank test over subjects, not corrected "
        "for the number of comparisons."
    )
    header = ["method", "difference", "95 % interval", "over trainings", "p", "subjects", "by seed"]
    content = table(f"Difference to {reference}", header, lines) + paragraph(note, "quiet") + missing(notes)
    return details(f"Is the difference to {reference} more than chance?", content)


def _interval(low: float | None, high: float | None) -> str:
    return "n/a" if low is None or high is None else f"{_hundred(low, sign='+')} to {_hundred(high, sign='+')}"


def _surface_table(found: Collected) -> str:
    """Distances and surface overlap after the last step, with the number of subjects that have one."""
    header = ["method", *(organ(name, found.classes) for name in found.classes)]
    parts = []
    for score, title, factor in (
        ("hd95_mm", "HD95 after the last step, mm: lower is better", 1),
        (
            "nsd",
            f"Surface overlap (NSD) after the last step, % within {found.nsd_tolerance_mm:g} mm: higher is better",
            100,
        ),
    ):
        lines = []
        for method in found.methods:
            by_seed: dict[int | None, list[np.ndarray]] = defaultdict(list)
            for run in (run for run in found.runs if run.method == method):
                if (values := last_scores([run], found.classes, score)[1]).size:
                    by_seed[run.seed].append(values)
            each = [values for folds in by_seed.values() for values in folds]
            if not all(np.isnan(values).all() for values in each):
                # as everywhere: of the subjects of a training, of the folds of a seed, of the seeds
                seeds = [
                    metrics.over_seeds([metrics.over_seeds(values)[0] for values in folds])[0]
                    for folds in by_seed.values()
                ]
                means, of = metrics.over_seeds(seeds)[0], np.concatenate(each)
                cells = [_mean_of(factor * means[c], of[:, c]) for c in range(len(found.classes))]
                lines.append([method_name(method, found.methods), *cells])
        if lines:
            parts.append(table(title, header, lines))
    if not parts:
        return ""
    note = (
        "Means over the test subjects that have a value; (a of b): so many of the subjects, times trainings, have one. "
        "A distance lacks where the organ was not found, is not there or is not labelled; an overlap lacks in the last "
        "two cases only."
    )
    return details("Distances between the outlines", "".join(parts) + paragraph(note, "quiet"))


def _cost_table(found: Collected) -> str:
    """Time, memory, network growth and what is kept of earlier data, by step; "" where nothing is scored."""
    shared = "step 1, of all methods"
    header = ["method, step", "time", "memory", "GPU memory", "parameters added", "prototypes", "scans kept"]
    lines = []
    for one in found.step_costs:
        if one.step == "step1" and any(name == shared for name, *_ in lines):
            continue
        is_joint = one.step == JOINT
        step = "all organs" if is_joint else one.step.replace("step", "step ")
        name = shared if one.step == "step1" else f"{method_name(one.method, found.methods)}, {step}"
        kept = ["all data"] * 2 if is_joint else [_kib(one.prototype_bytes), _kib(one.replay_bytes)]
        lines.append(
            [
                name,
                _duration(one.seconds) if one.seconds is not None else "",
                _gib(one.memory_bytes),
                _gib(one.gpu_memory_bytes),
                f"{one.parameters_added:,.0f}" if one.parameters_added is not None else "",
                *kept,
            ]
        )
    if not lines:
        return ""
    note = (
        "Means over the trainings of which it is known. Time is that of pseudo-labels, training and prototypes; memory "
        "the most that a training's own process had at once, without those that augment. The last two columns are what "
        "a step finds of earlier data: the prototypes beside the model before, which only prototype methods read, and "
        "the scans that a method keeps."
    )
    return details("What a step takes, and what it keeps", table("By step", header, lines) + paragraph(note, "quiet"))


def _kib(size: float | None) -> str:
    return "" if size is None else "none" if size == 0 else f"{max(size / 1024, 0.1):,.1f} KiB"


def _mean_of(mean: float, each: np.ndarray) -> str:
    """A mean, and how many of ``each``, the values of all subjects and trainings, are there."""
    n = int((~np.isnan(each)).sum())
    if not n:
        return "n/a"
    few = f" <small>({n} of {each.size})</small>" if n < each.size else ""
    return f"{mean:.1f}{few}"


def _made(found: Collected, commands: Sequence[str]) -> str:
    models = found.models
    trainings = "\n".join(model.train_command for model in models if model.train_command)
    predictions = "\n".join([*(model.predict_command for model in models), *found.predict_ensembles])
    settings = yaml.safe_dump(provenance.without_folders(dict(found.schedule)), sort_keys=False, allow_unicode=True)
    test_hash = (
        f" The test set, with images and labels, has the sha256 {found.test_sha256}." if found.test_sha256 else ""
    )
    seeds = listed(list(dict.fromkeys(str(run.seed) for run in found.runs))) or "none"
    where = f"TEST_IMAGES is $nnUNet_results/chain_{found.name}/test/images"
    return "".join(
        [
            "<h3>Commands</h3>",
            code("\n".join(commands), "Commands"),
            details("Every training, as plain nnU-Net commands", code(trainings, "Training commands")),
            details(f"Every prediction; {where}", code(predictions, "Prediction commands")),
            "<h3>Seeds and data</h3>",
            paragraph(
                f"Seeds {seeds}; folds {listed([str(fold) for fold in found.schedule['folds']])}. "
                f"{counted(len(found.test.get('cases', {})), 'test subject')}.{test_hash} "
                f"The schedule file {found.schedule_file.name} has the sha256 {found.schedule_sha256}."
            ),
            details("All settings in force", code(settings, "Settings")),
            "<h3>Models</h3>",
            table(
                "Hash and cost of each model",
                ["model", "state", "checkpoint, sha256", "time", "per iteration", "memory", "GPU memory", "trained on"],
                [_model_line(model, found.methods) for model in models],
                "text",
            ),
            "<h3>Versions and machine</h3>",
            element(
                "div",
                _pairs("Installed where the report was written", provenance.versions())
                + _pairs("Machine that wrote the report", provenance.machine()),
                class_="side",
            ),
            missing(found.problems),
        ]
    )


def _pairs(title: str, pairs: Mapping[str, str]) -> str:
    return table(title, ["what", "which"], [[escape(key), escape(value)] for key, value in pairs.items()], "text")


def _model_line(model: Model, methods: Sequence[str]) -> list[str]:
    which = f"seed {model.seed}, fold {model.fold}"
    name = "all organs" if model.step == JOINT else f"step {model.step}"
    state = "scored" if model.scores is not None else "trained" if model.trained else "not trained yet"
    seconds, each = total_seconds(model.cost), model.cost.get("seconds_per_iteration")
    memory, gpu_memory = (model.cost.get(key) for key in ("peak_memory_bytes", "peak_gpu_memory_bytes"))
    return [
        f"{method_name(model.method, methods)}, {name} <small>{escape(which)}</small>",
        state,
        element("code", escape(model.checkpoint_sha256[:16])) if model.checkpoint_sha256 else "",
        _duration(seconds) if seconds is not None else "",
        f"{each:.2f} s" if each is not None else "",
        _gib(memory),
        _gib(gpu_memory),
        escape(", ".join(f"torch {v}" if k == "torch" else v for k, v in model.machine.items())),
    ]


def _gib(size: float | None) -> str:
    return f"{size / 2**30:.1f} GiB" if size is not None else ""


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
