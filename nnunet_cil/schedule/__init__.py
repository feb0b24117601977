"""The schedule: a YAML file that says what is learned when, on what, and how.

``load_schedule`` checks the whole file and the folders it names and reports every problem at once.

- ``content``: what a schedule holds, once it is checked.
- ``load``: from a file to a schedule.
- ``reading``: the file while it is read, and the problems found so far.
- ``method``, ``settings``: numbers, choices and names.
- ``raw_datasets``, ``steps``, ``held_out``: the data that are named.
"""

from nnunet_cil.schedule.content import (
    KEYS,
    MIN_STAGES,
    Guard,
    Intensity,
    Launcher,
    PlanOverride,
    Schedule,
    ScheduleError,
    Step,
    TestSet,
    Training,
    kept_source,
)
from nnunet_cil.schedule.load import load_schedule
from nnunet_cil.schedule.method import ABLATIONS, METHOD_DEFAULTS, STORED_METHOD_DEFAULTS, in_effect

__all__ = [
    "ABLATIONS",
    "KEYS",
    "METHOD_DEFAULTS",
    "MIN_STAGES",
    "STORED_METHOD_DEFAULTS",
    "Guard",
    "Intensity",
    "Launcher",
    "PlanOverride",
    "Schedule",
    "ScheduleError",
    "Step",
    "TestSet",
    "Training",
    "in_effect",
    "kept_source",
    "load_schedule",
]
