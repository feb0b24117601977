"""A chain as it lies on disk after its trainings, made of small files by hand: nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from nnunet_cil.chain import JOINT, Chain, Variant
from nnunet_cil.evaluate import evaluation_file, scored_as
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import REPLAY_FILE, write_json
from tests.conftest import write_tiny_dataset

STEPS = (("ball", "tube"), ("blob",))
SHAPE = (12, 24, 24)
SPACING_MM = (1.0, 1.0, 2.0)

SCHEDULE = """\
name: {name}
source: {source}
test: {source}/split.json
device: cpu
trainer: {trainer}
training: {{epochs: 3, iterations_per_epoch: 2, seed: 0}}
steps: {steps}
"""


def open_chain(
    folder: Path, steps: Sequence[Sequence[str]] = STEPS, name: str = "tiny", trainer: str = "nnUNetTrainerPGCD"
) -> Chain:
    """A planned chain with these classes by step; nnU-Net's variables must be set."""
    source = write_tiny_dataset(folder / "source", n_cases=2)
    dataset = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    names = [name for classes in steps for name in classes]
    dataset["labels"] = {"background": 0, **{name: value for value, name in enumerate(names, 1)}}
    (source / "dataset.json").write_text(json.dumps(dataset))
    path = folder / f"{name}.yaml"
    listed = json.dumps([list(c) for c in steps])
    path.write_text(SCHEDULE.format(name=name, source=source, trainer=trainer, steps=listed))
    chain = Chain.open(load_schedule(path))
    chain.content["plans_name"] = "nnUNetPlans"
    chain.save()
    return chain


def write_volume(array: np.ndarray, path: Path) -> None:
    """Write an array (Z, Y, X) whose axes run to the head, to the back and to the patient's left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = SimpleITK.GetImageFromArray(array)
    volume.SetSpacing(SPACING_MM)
    SimpleITK.WriteImage(volume, str(path))


def organs(n_classes: int, seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Labels (Z, Y, X): balls on a circle, one a class."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(s) for s in shape], indexing="ij")
    labels = np.zeros(shape, np.uint8)
    for c in range(n_classes):
        angle = 2 * np.pi * c / n_classes
        centre = np.array(shape) / 2 + [0, shape[1] * 0.3 * np.sin(angle), shape[2] * 0.3 * np.cos(angle)]
        centre += rng.uniform(-1, 1, 3)
        radius = shape[1] * min(0.2, 0.7 / n_classes)
        labels[(2 * (z - centre[0])) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < radius**2] = c + 1
    return labels


def write_test_set(chain: Chain, cases: Sequence[str], shape: Sequence[int] = SHAPE) -> None:
    """Images, labels and ``test.json`` of the chain's test set."""
    folder, n = chain.folder / "test", len(chain.schedule.classes)
    for number, case in enumerate(cases):
        labels = organs(n, number, shape)
        image = np.random.default_rng(number).normal(0, 12, shape) + 40 * (labels > 0) + 3.0 * labels
        write_volume(image.astype(np.float32), folder / "images" / f"{case}_0000.nii.gz")
        write_volume(labels, folder / "labels" / f"{case}.nii.gz")
    content = {
        "test": chain.schedule.to_dict()["test"],
        "ignore": n + 1,
        "file_ending": ".nii.gz",
        "cases": {case: {"labelled": [*range(1, n + 1)], "set": 0} for case in cases},
    }
    write_json(folder / "test.json", content)


def write_scores(
    chain: Chain, variant: Variant, step: int | str, scores: dict[str, dict[str, float | None]], fold: str = "all"
) -> Path:
    """An evaluation file from the Dice of each case and class; returns the folder for the predictions."""
    path = evaluation_file(chain, variant, step, fold)
    sha256 = (f"{variant.method}{variant.seed}{step}".encode().hex() * 16)[:64]
    entries = {
        case: {
            name: {
                "dice": dice,
                "nsd": dice if dice is None else dice**0.5,
                "hd95_mm": None if not dice else round(12 - 10 * dice, 2),
            }
            for name, dice in classes.items()
        }
        for case, classes in scores.items()
    }
    absent = {
        case: {name: "missed" if dice == 0 else "both_empty" for name, dice in classes.items() if not dice}
        for case, classes in scores.items()
    }
    content = {
        "checkpoint_sha256": sha256,
        "test_sha256": "7e57" * 16,  # where there is no test set
        **scored_as(chain),
        "method": variant.method,
        "seed": variant.seed,
        "step": step,
        "fold": fold,
        "parameters": 1000 + 9 * (chain.n_steps if step == JOINT else int(step)),
        "scores": entries,
        "absent": absent,
    }
    write_json(path, content)
    return path.parent / f"{sha256[:16]}_{content['test_sha256'][:16]}"


def write_predictions(chain: Chain, folder: Path, scores: dict[str, dict[str, float | None]]) -> None:
    """Masks whose organs are the expert's, but for those with Dice 0, which are missing."""
    for case, classes in scores.items():
        labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(chain.folder / "test/labels" / f"{case}.nii.gz")))
        found = [value for value, name in enumerate(chain.schedule.classes, 1) if classes.get(name)]
        shifted = np.roll(np.where(np.isin(labels, found), labels, 0).astype(np.uint8), 1, axis=2)
        write_volume(shifted, folder / f"{case}.nii.gz")


def store(
    names: Sequence[str], step: int, shift: float = 0.0, stale: Sequence[str] = (), sha256: str = ""
) -> PrototypeStore:
    """Prototypes of eight features that move by ``shift`` spreads in one direction; 1 is the spread of each class."""
    rng = np.random.default_rng(5)
    means = rng.normal(0, 3, (40, 8))[: len(names)].astype(np.float32)
    means[:, 0] += shift
    return PrototypeStore(
        class_names=tuple(names),
        means=means,
        counts=np.array([0.0 if name in stale else 100.0 for name in names]),
        spread=np.ones(len(names), np.float32),
        centre=means.mean(0),
        tau=0.2,
        stale=np.array([name in stale for name in names]),
        step=step,
        checkpoint_sha256=sha256,
        feature_path="decoder.stages.2",
    )


def write_log(folder: Path, terms: dict[str, Sequence[float]], start: int = 0, number: int = 1) -> None:
    """A training log as nnU-Net and our trainer write it."""
    lines = ["2026-01-01 10:00:00.0: Precision: torch.bfloat16, 2 threads ", ""]
    for epoch in range(len(next(iter(terms.values())))):
        lines.append(f"2026-01-01 10:00:01.0: Epoch {start + epoch} ")
        lines += [f"2026-01-01 10:00:02.0: loss_{name} {values[epoch]:.5f} " for name, values in terms.items()]
        lines += ["2026-01-01 10:00:02.1: train_loss -0.2981 ", "2026-01-01 10:00:02.2: Epoch time: 20.66 s "]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"training_log_2026_1_{number}_10_00_00.txt").write_text("\n".join(lines) + "\n")


def write_model(chain: Chain, variant: Variant, step: int | str, terms: dict[str, Sequence[float]]) -> Path:
    """What a finished training leaves in its fold's folder; without terms a log of none. Returns that folder."""
    model = chain.model_folder(variant, step)
    folder = model / "fold_all"
    (folder / "validation").mkdir(parents=True)
    (folder / "validation" / "summary.json").write_text("{}")
    (folder / "checkpoint_final.pth").write_bytes(b"weights")
    write_json(model / "dataset.json", {"channel_names": {"0": "CT"}, "labels": {}, "file_ending": ".nii.gz"})
    cost = {"seconds_training": 90.0, "seconds_per_iteration": 0.25, "peak_memory_bytes": 2**31}
    write_json(folder / "cost.json", {**cost, "peak_gpu_memory_bytes": None})
    if variant.method == "replay" and step not in (1, JOINT):
        write_json(folder / REPLAY_FILE, {"bytes": 3 * 2**20, "cases": {}})
    debug = {"device": "cpu", "torch_version": "9.9.9", "hostname": "secret-host", "output_folder": "/home/secret/x"}
    write_json(folder / "debug.json", debug)
    write_log(folder, terms or {"": [0.0, 0.0]})
    number = chain.n_steps if step == JOINT else int(step)
    stale = chain.schedule.classes_until(number - 1) if variant.method == "finetune" else ()
    names = ("background", *chain.schedule.classes_until(number))
    store(names, number, 0.5 * (number - 1), stale).save(folder / "prototypes.npz")
    return folder


def write_chain(
    chain: Chain,
    methods: Sequence[str] = ("pgcd", "finetune", "joint"),
    seeds: Sequence[int] = (0,),
    cases: Sequence[str] = ("case_1", "case_2", "case_3"),
    shape: Sequence[int] = SHAPE,
) -> list[Variant]:
    """A whole chain of these methods: pgcd and others keep what they know, finetune loses it. Returns the variants."""
    write_test_set(chain, cases, shape)
    variants = [chain.variant(method, seed) for seed in seeds for method in methods]
    done = set()
    for variant in variants:
        for step in chain.steps_of(variant):
            owner = chain.owner(variant, step)
            if (owner, step) in done:
                continue
            done.add((owner, step))
            scores = _scores(chain, owner, step, cases, list(methods).index(variant.method))
            write_predictions(chain, write_scores(chain, owner, step, scores), scores)
            terms = {"segmentation": [-0.3, -0.6, -0.8]}
            if variant.method not in ("finetune", JOINT):
                terms |= {"pgcd_spatial": [0.002, 0.008, 0.006], "pgcd_channel": [0.001, 0.004, 0.003]}
                terms |= {"dapd_local": [0.0001, 0.0005, 0.0004]}
            write_model(chain, owner, step, terms if step not in (1, JOINT) else {})
    return variants


def _scores(chain: Chain, variant: Variant, step: int | str, cases: Sequence[str], rank: int) -> dict:
    number = chain.n_steps if step == JOINT else int(step)
    names = chain.schedule.classes_until(number)
    old = chain.schedule.classes_until(number - 1) if step != JOINT else ()
    rng = np.random.default_rng([number, rank, variant.seed or 0])
    found = {}
    for case in cases:
        scores = np.clip(0.9 - 0.03 * rank + rng.normal(0, 0.03, len(names)), 0, 1)
        if variant.method == "finetune":
            scores = np.where([name in old for name in names], 0.0, scores)
        found[case] = dict(zip(names, scores.tolist(), strict=True))
    return found
