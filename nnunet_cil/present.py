"""Which methods and seeds a chain has: those that are scored, begun or only prepared."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_cil.block import BLOCK_KEY
from nnunet_cil.chain import JOINT, SCORE_FILES, Chain, Variant
from nnunet_cil.untrusted import read_json

logger = logging.getLogger(__name__)


def present_variants(
    chain: Chain, methods: Sequence[str] = (), seeds: Sequence[int | None] = (), prepared: bool = False
) -> list[Variant]:
    """The methods with the seeds that are asked for; where none are named, those that the chain has.

    The chain has what is scored and what a training was begun of. Step 1 is shared, so it counts where there is nothing
    else. A file that cannot be read, or is of a variant that the schedule no longer has, is passed over with a warning.

    Args:
        methods, seeds: names of methods, and seeds; empty for those that are there.
        prepared: whether plans are enough.

    Returns:
        Seeds outermost, each with the chain's own method first, then joint of all seeds; or as asked for. The
        schedule's own where there is nothing yet.
    """
    first, later = [], []
    for path, step in _files(chain, prepared):
        try:
            content = read_json(path, "an object")
            if step is not None and BLOCK_KEY not in content:  # nnU-Net's own plans
                continue
            method, seed, step = _of_scores(content) if step is None else (*_of_plans(content), step)
            (first if step == 1 else later).append(chain.variant(method, seed))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is passed over: %s", path, error)
    found = _ordered(chain, later or first)
    seeds = list(dict.fromkeys(seeds or [variant.seed for variant in found] or [chain.schedule.training.seed]))
    if methods:
        return [chain.variant(method, seed) for seed in seeds for method in dict.fromkeys(methods)]
    by_seed = ([variant for variant in found if variant.seed == seed] or [chain.first_step(seed)] for seed in seeds)
    return sorted((variant for variants in by_seed for variant in variants), key=lambda each: each.method == JOINT)


def _files(chain: Chain, prepared: bool) -> Iterator[tuple[Path, int | str | None]]:
    """Files that name a method and a seed: plans with their step, scores with None, as they name it themselves."""
    for step in (*chain.schedule.own_steps, JOINT):
        yield from ((path, step) for path in sorted(chain.results(step).glob("*/plans.json")))
        if prepared:
            plans = chain.preprocessed(step).glob(f"{chain.content['plans_name']}*.json")
            yield from ((path, step) for path in sorted(plans))
    yield from ((path, None) for path in sorted(chain.folder.glob(SCORE_FILES)))


def _of_scores(content: Mapping[str, Any]) -> tuple[str, int | None, int | str]:
    return content["method"], content["seed"], content["step"]


def _of_plans(content: Mapping[str, Any]) -> tuple[str, int | None]:
    return content[BLOCK_KEY]["method"], content[BLOCK_KEY]["training"]["seed"]


def _ordered(chain: Chain, variants: Iterable[Variant]) -> list[Variant]:
    def place(variant: Variant) -> tuple[bool, int, bool, str]:
        method, seed = variant.method, variant.seed
        return seed is None, seed or 0, method != chain.default_method, method

    return sorted(set(variants), key=place)
