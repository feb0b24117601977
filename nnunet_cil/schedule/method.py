"""The settings of a method: their defaults and choices, the ablations, and how ``method`` and ``variants`` are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nnunet_cil.schedule.reading import Reading, is_float, is_int
from nnunet_cil.untrusted import EXPECTED_PART, MAX_NAME_BYTES, is_part

METHOD_DEFAULTS: Mapping[str, Any] = {
    "lambda_pgcd": 1.0,
    "lambda_dapd": 0.01,
    "eta": 0.01,
    "w_max": 3.0,
    "mu": 0.99,
    "n_min": 10,
    "tau_old": 0.5,
    "tau_background": 0.7,
    "pseudo_labels": "offline",
    "pseudo_label_mirroring": False,
    "one_piece": "auto",
    "old_prototypes": "reextract",
    "background_features": "teacher",
    "class_balance": False,
    "class_balance_max": 5.0,
    "scale_by_classes": False,
    "new_rows": "prototypes",
    "pgcd_spatial": True,
    "calibration": "prototypes",
    "voxel_stride": 4,
    "dapd_global": True,
    "dapd_local": True,
    "fusion": None,
    "lambda_kd": 1.0,
    "lambda_lwf": 1.0,
    "lwf_temperature": 2.0,
    "lambda_ilt": 1.0,
    "lambda_pod": 0.01,
    "lambda_pod_logits": 0.0005,
    "lambda_ewc": 100.0,
    "ewc_patches": 50,
    "replay_cases": 4,
}
STORED_METHOD_DEFAULTS: Mapping[str, Any] = {**METHOD_DEFAULTS, "voxel_stride": 1, "one_piece": False}
"""What a key meant that a stored chain or model lacks: a version without it trained so."""
METHOD_CHOICES = {
    "pseudo_labels": ("offline", "online", "off"),
    "old_prototypes": ("reextract", "transport"),
    "background_features": ("teacher", "student"),
    "calibration": ("prototypes", "uniform"),
    "new_rows": ("background", "prototypes"),
}
FROM_ONE = ("voxel_stride", "n_min", "ewc_patches")
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no_spatial": {"pgcd_spatial": False},
    "no_channel": {"eta": 0.0},
    "no_pgcd": {"lambda_pgcd": 0.0},
    "no_dapd_global": {"dapd_global": False},
    "no_dapd_local": {"dapd_local": False},
    "no_dapd": {"lambda_dapd": 0.0},
    "static_background": {"mu": 1.0},
    "uniform_weights": {"calibration": "uniform"},
    "no_pseudo_labels": {"pseudo_labels": "off", "class_balance": False},
    "background_rows": {"new_rows": "background"},
    "rows_only": {"lambda_pgcd": 0.0, "lambda_dapd": 0.0},
}


def in_effect(method: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of PGCD without those that change nothing, as the term that they belong to is off."""
    no_pgcd, no_dapd = (not method[key] for key in ("lambda_pgcd", "lambda_dapd"))
    unused = {
        *(("pgcd_spatial", "eta", "calibration") if no_pgcd else ()),
        *(("dapd_global", "dapd_local") if no_dapd else ()),
        *(("mu",) if no_pgcd and no_dapd else ()),
    }
    return {key: value for key, value in method.items() if key not in unused}


def method_of(reading: Reading, where: str, value: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    given = reading.mapping(where, value, tuple(METHOD_DEFAULTS))
    if given.get("pseudo_labels") is False:  # YAML reads off as false
        given["pseudo_labels"] = "off"
    for key, v in given.items():
        default = METHOD_DEFAULTS[key]
        if key in METHOD_CHOICES:
            reading.choice(f"{where}: {key}", v, METHOD_CHOICES[key])
        elif key == "one_piece":
            named = isinstance(v, list) and all(isinstance(name, str) for name in v)
            if not (v == "auto" or isinstance(v, bool) or named):
                reading.problem(f"{where}: {key}", repr(v), "auto, true, false or a list of classes")
        elif key == "fusion":
            if not (v is None or v == "auto" or (is_float(v) and 0 <= v <= 1)):
                reading.problem(f"{where}: {key}", repr(v), "auto, a number from 0 to 1, or null")
        elif isinstance(default, bool):
            if not isinstance(v, bool):
                reading.problem(f"{where}: {key}", repr(v), "true or false")
        elif isinstance(default, int):
            least = int(key in FROM_ONE)
            if not (is_int(v) and v >= least):
                reading.problem(f"{where}: {key}", repr(v), f"a whole number from {least} on")
        elif not is_float(v) or v < 0:
            reading.problem(f"{where}: {key}", repr(v), "a number from 0 on")
        elif key in ("mu", "tau_old", "tau_background") and v > 1:
            reading.problem(f"{where}: {key}", repr(v), "a number from 0 to 1")
        elif key == "lwf_temperature" and v == 0:
            reading.problem(f"{where}: {key}", repr(v), "a number above 0")
    method = {**base, **given}
    if method["class_balance"] is True and method["pseudo_labels"] != "offline":
        reading.problem(
            f"{where}: class_balance",
            f"true with pseudo_labels: {method['pseudo_labels']}",
            "offline ones, over which the balance is counted once",
        )
    if method["one_piece"] not in ("auto", False) and method["pseudo_labels"] == "online":
        reading.problem(
            f"{where}: one_piece",
            f"{method['one_piece']} with pseudo_labels: online",
            "offline ones, which are of whole images",
        )
    return method


def variants_of(reading: Reading, value: Any, base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each named variant changes; its ``trainer`` names the method it varies."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        reading.problem("variants", repr(value), "a mapping of names to what each changes")
        return {}
    variants = {}
    for name, changes in value.items():
        if not re.fullmatch(rf"[a-z][a-z0-9_]{{0,{MAX_NAME_BYTES // 2 - 1}}}", name):
            reading.problem(
                f"variants: {name}", repr(name), f"lower-case letters, digits and _: at most {MAX_NAME_BYTES // 2}"
            )
        if not is_part(name):
            reading.problem(f"variants: {name}", repr(name), EXPECTED_PART)
        if re.search(r"(^|_)seed(\d+|none)$", name):
            reading.problem(
                f"variants: {name}",
                repr(name),
                "a name that does not end like that of a seed: its models would be in one folder with another's",
            )
        if not isinstance(changes, dict) or not changes:
            reading.problem(f"variants: {name}", repr(changes), "a mapping of settings, as in `method`")
            continue
        trainer = changes.get("trainer", "nnUNetTrainer")
        reading.class_of_nnunet(f"variants: {name}: trainer", trainer)
        settings = {key: v for key, v in changes.items() if key != "trainer"}
        whole = method_of(reading, f"variants: {name}", settings, base)
        variants[name] = {key: whole[key] for key in settings if key in whole}
        if "trainer" in changes:
            variants[name]["trainer"] = trainer
    return variants
