"""``nnunet-cil`` with trainings of two iterations and few methods: what tests of the documentation run in its place."""

from __future__ import annotations

import sys

from nnunet_cil import driver, schedule, source_check
from nnunet_cil.cli.main import main
from nnunet_cil.report import figures

SHORT = {"epochs": 1, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1}


def shorten() -> None:
    """Whatever a schedule says, a training is short; `compare` and `ablate` have one method beside the chain's own."""
    whole = schedule.Training.__init__
    schedule.Training.__init__ = lambda training, **given: whole(training, **(given | SHORT))
    source_check.INTENSITY_SAMPLES = 10**4
    figures._LOOK["pdf.fonttype"] = 3
    driver.COMPARED = ("finetune",)
    driver.ABLATIONS = {"no_channel": schedule.ABLATIONS["no_channel"]}


if __name__ == "__main__":
    shorten()
    sys.exit(main())
