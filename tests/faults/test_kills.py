"""kill -9 at any moment, and the same command again: the chain ends as if nothing had been, and every file is whole."""

from __future__ import annotations

import random
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tests.faults.chains import Kill, TinyChain, results, unreadable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and ends commands as Linux does")

AT_RANDOM = 25
LONGEST_SECONDS = 4.0

TRAINER = "nnunet_cil.trainer:IncrementalTrainer"
PREDICT = "nnunetv2.inference.predict_from_raw_data:nnUNetPredictor.predict_logits_from_preprocessed_data"
# in the order of a chain: after each kill the same command goes on until the next
IN_RUN = [
    ("preparation", Kill("nnunet_cil.nnunet_api:link_or_copy", 1)),
    ("preparation", Kill("SimpleITK:WriteImage", 3, "half")),
    ("preparation", Kill("json:dump", 1, "half")),
    ("preparation", Kill("pathlib:Path.write_text", 4, "half")),
    ("preparation", Kill("blosc2:asarray", 11, "half")),
    ("preparation", Kill("pickle:dump", 2, "half")),
    ("preparation", Kill("nnunet_cil.nnunet_api:derive_case", 2, "after")),
    ("mid-epoch", Kill("nnunetv2.training.nnUNetTrainer.nnUNetTrainer:save_json", 1, "half")),
    ("mid-epoch", Kill(f"{TRAINER}.train_step", 1)),
    ("checkpoint", Kill("torch:save", 1, "half")),
    ("checkpoint", Kill("torch:save", 4, "half")),
    ("mid-epoch", Kill(f"{TRAINER}.train_step", 4, "after", training_only=True)),
    ("checkpoint", Kill("torch:save", 2, "half")),
    ("prototypes", Kill(f"{TRAINER}._image_and_sure_labels", 2)),
    ("prototypes", Kill("numpy:savez", 1, "half")),
    ("prototypes", Kill("nnunet_cil.trainer:write_lineage", 1)),
    ("prototypes", Kill("nnunet_cil.trainer:write_lineage", 1, "after")),
    ("prototypes", Kill(f"{TRAINER}.perform_actual_validation", 1)),
    ("prediction", Kill("blosc2:asarray", 5, "half")),
    ("prediction", Kill(PREDICT, 1)),
    ("prediction", Kill("SimpleITK:WriteImage", 2, "half")),
    ("scoring", Kill("nnunet_cil.nnunet_api:case_metrics", 2)),
    ("scoring", Kill("nnunet_cil.evaluate:write_json", 1)),
    ("report", Kill("nnunet_cil.driver:write_matrices", 1)),
    ("report", Kill("matplotlib.figure:Figure.savefig", 1, "half")),
    ("mid-epoch", Kill("nnunet_cil.pseudo_labels:PseudoLabelCache._add", 2)),
    ("mid-epoch", Kill("numpy:savez", 2, "half")),
    ("mid-epoch", Kill(f"{TRAINER}.train_step", 2, "after")),
    ("checkpoint", Kill("torch:save", 1, "half", training_only=True)),
    ("mid-epoch", Kill(f"{TRAINER}.train_step", 4)),
    ("checkpoint", Kill("torch:save", 3, "half")),
    ("prototypes", Kill("nnunet_cil.prototypes:PrototypeStore.save", 1)),
    ("prototypes", Kill("numpy:savez", 1, "half")),
    ("prediction", Kill(PREDICT, 1, "after")),
    ("scoring", Kill("nnunet_cil.evaluate:write_json", 1, "after")),
    ("scoring", Kill("nnunet_cil.driver:check_step", 2)),
    ("report", Kill("nnunet_cil.driver:collect_scores", 2, "after")),
]
# then those that only several methods have; 8 iterations has only the joint training, which takes twice as many epochs
COMPARED = ("--methods", "pgcd", "plop", "joint")
IN_COMPARE = [
    ("pseudo-labels", Kill("nnunet_cil.trainer:entropy_histogram", 1, "after")),
    ("mid-epoch", Kill(f"{TRAINER}.train_step", 8)),
    ("report", Kill("nnunet_cil.driver:paired_table", 1)),
]
IN_REPORT = [
    ("report", Kill("matplotlib.figure:Figure.savefig", 2, "half")),
    ("report", Kill("pathlib:Path.write_bytes", 1, "half")),
]
PHASES = tuple(dict.fromkeys(phase for phase, _ in IN_RUN))


def undisturbed(folder: Path, *command: str, fresh: bool) -> dict:
    """Results of a chain that nothing happened to; its trainings are fresh processes if so wished."""
    folder.mkdir()
    chain = TinyChain(folder)
    assert chain.types(*command, forked=not fresh) == 0, chain.said()
    return results(folder)


def check_ended(chain: TinyChain, expected: dict) -> None:
    """The command ran to its end: nothing is lost, nothing is damaged."""
    assert results(chain.root) == expected
    assert unreadable(chain.root, ended=True) == []
    assert chain.types("verify") == 0, chain.said()


def kill_on_purpose(chain: TinyChain, kills: list[tuple[str, Kill]], *command: str) -> Counter:
    for phase, kill in kills:
        status = chain.types(*command, kill=kill)
        where = f"{phase}: {kill}: {status}: {chain.said()}"
        assert status == (1 if kill.training_only else -9), where
        assert not kill.training_only or "the training ended with code -9" in chain.said(), where
        assert unreadable(chain.root, ended=False) == [], where
    return Counter(phase for phase, _ in kills)


@pytest.mark.faults("kill -9", "the same command goes on, and ends as if nothing had been", "unfinished epoch")
def test_a_comparison_that_is_killed_in_each_phase_ends_like_an_undisturbed_one(tmp_path, record_property):
    command = ("compare", *COMPARED)
    expected = undisturbed(tmp_path / "undisturbed", *command, fresh=False)
    assert "difference to pgcd" in expected["table"]
    (tmp_path / "killed").mkdir()
    chain = TinyChain(tmp_path / "killed")
    once = [next(entry for entry in islice(IN_RUN, 4, None) if entry[0] == phase) for phase in PHASES]
    kills = kill_on_purpose(chain, once + IN_COMPARE, *command)
    assert chain.types(*command) == 0, chain.said()
    check_ended(chain, expected)
    record_property("kills", dict(kills))


@pytest.mark.slow
@pytest.mark.faults("kill -9", "the same command goes on, and ends as if nothing had been", "unfinished epoch")
def test_chains_that_are_killed_at_many_moments_end_like_an_undisturbed_one(tmp_path, record_property):
    expected = undisturbed(tmp_path / "undisturbed", "run", fresh=True)
    (tmp_path / "killed").mkdir()
    moments = random.Random(0)
    chain = TinyChain(tmp_path / "killed")
    kills = kill_on_purpose(chain, IN_RUN, "run")
    assert chain.types("run") == 0, chain.said()
    kills += kill_on_purpose(chain, IN_REPORT, "report")
    assert chain.types("report") == 0, chain.said()
    check_ended(chain, expected)
    chain.remove()
    while kills["any moment"] < AT_RANDOM:
        status = chain.types("run", kill=Kill(seconds=moments.uniform(0, LONGEST_SECONDS)))
        assert status in (0, -9), chain.said()
        assert unreadable(chain.root, ended=status == 0) == []
        if status == 0:
            check_ended(chain, expected)
            chain.remove()
        else:
            kills["any moment"] += 1
    assert chain.types("run") == 0, chain.said()
    check_ended(chain, expected)
    record_property("kills", dict(kills))
