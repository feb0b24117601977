"""The schedule: a YAML file that says what is learned when, on what, and how.

``load_schedule`` checks the whole file and the folders it names and reports every problem at once.
"""

from nnunet_cil.schedule.content import (
    ABLATIONS,
    CONFIGURATIONS,
    DEVICES,
    KEYS,
    METHOD_CHOICES,
    METHOD_DEFAULTS,
    MIN_STAGES,
    STORED_METHOD_DEFAULTS,
    Guard,
    Intensity,
    Launcher,
    PlanOverride,
    Schedule,
    ScheduleError,
    Step,
    TestSet,
    Training,
    in_effect,
    kept_source,
)
from nnunet_cil.schedule.load import load_schedule

__all__ = [
    "ABLATIONS",
    "CONFIGURATIONS",
    "DEVICES",
    "KEYS",
    "METHOD_CHOICES",
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
