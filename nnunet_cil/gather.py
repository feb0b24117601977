"""Scores of one chain that ran in parts on several machines: other seeds, other methods, one table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_cil.chain import CHAIN_FILE, JOINT, SCORE_FILES, Chain, read_chain
from nnunet_cil.evaluate import check_scores, evaluation_file, scored_as, scored_folds
from nnunet_cil.step_files import write_json
from nnunet_cil.untrusted import read_json

logger = logging.getLogger(__name__)


def gather_scores(chain: Chain, folders: Sequence[Path]) -> int:
    """Take over the scores of models that were trained elsewhere; those that are here are kept.

    Args:
        folders: of the same chain on other machines, ``chain_NAME`` of nnUNet_results. They need ``chain.json`` and
            ``predictions/*/*/scores.json``, nothing else.

    Returns:
        How many models' scores are new here.

    Raises:
        FileNotFoundError: a folder is not there, or has no ``chain.json``.
        ValueError: the schedule has no test set, nothing is prepared here, or scores are damaged, of another schedule,
            test set or tolerance, or differ from those that are here. Nothing was copied then.
    """
    if not chain.schedule.test:
        raise ValueError(
            f"{chain.schedule.file}: test: got nothing, expected the test set of these scores. Take the schedule of "
            "the machine that scored them."
        )
    test_file = chain.folder / "test" / "test.json"
    if chain.content["plans_name"] is None or not test_file.is_file():
        raise ValueError(
            f"{chain.folder}: got no prepared chain with a test set, expected one to bring scores to. Run `nnunet-cil "
            f"prepare {chain.schedule.file}` first."
        )
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: got no such folder, expected {chain.folder.name} of another machine.")
        if not (folder / CHAIN_FILE).is_file():
            raise FileNotFoundError(
                f"{folder}: got a folder without {CHAIN_FILE}, expected {chain.folder.name} of another machine."
            )
    expected = scored_as(chain)
    new: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        theirs = Chain(chain.schedule, read_chain(folder / CHAIN_FILE))
        for path in sorted(folder.glob(SCORE_FILES)):
            content = read_json(path, "scores of test subjects")
            check_scores(content, path)
            target = _place(chain, content, path)
            _check_same_settings(theirs, content, path)
            for key, wanted in expected.items():
                if content.get(key) != wanted:
                    raise ValueError(
                        f"{path}: {key}: got {content.get(key)}, expected {wanted} as in {chain.folder}: these scores "
                        "are of other test images or labels, or of another tolerance. Run `nnunet-cil evaluate` there, "
                        "with this schedule."
                    )
            known = new.get(target) or (read_json(target, "scores") if target.is_file() else None)
            if known is not None and known["scores"] != content["scores"]:
                raise ValueError(
                    f"{path}: got other scores than {target} has, expected the same: it is another training of "
                    "the same method, seed and step. Leave one of the two out."
                )
            if known is None:
                new[target] = content
    for target, content in new.items():
        write_json(target, content)
    return len(new)


def _place(chain: Chain, content: dict[str, Any], path: Path) -> Path:
    """Where scores belong in this chain; that is where they lie in the other, too."""
    try:
        step, fold, seed, method = (content[key] for key in ("step", "fold", "seed", "method"))
        variant = chain.variant(method, seed)
        known = step == JOINT or step in range(1, chain.n_steps + 1)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: got no method, seed, step and fold ({error!r}), expected a model's.") from error
    place = evaluation_file(chain, variant, step, fold)
    if not known or fold not in scored_folds(chain) or place.parts[-3:] != path.parts[-3:]:
        raise ValueError(
            f"{path}: got scores of {method}, seed {seed}, step {step}, fold {fold}, expected a step and fold of this "
            f"chain in {Path(*place.parts[-3:])}."
        )
    return place


def _check_same_settings(theirs: Chain, content: dict[str, Any], path: Path) -> None:
    base = content["method"].partition("-")[0]
    ours, known = dict(theirs.schedule.variants.get(base, {})), theirs.content["schedule"].get("variants")
    other = known.get(base, {}) if isinstance(known, dict) else {}
    differing = theirs.differing_keys() + (
        [f"variants: {base}: chain {other}, schedule {ours}"] if ours != other else []
    )
    if differing:
        lines = "\n  ".join(differing)
        raise ValueError(f"{path}: got scores of another schedule, expected the same as here:\n  {lines}")
