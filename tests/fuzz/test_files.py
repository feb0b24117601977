"""Damaged files from elsewhere: reading succeeds or says in our words what is wrong, and nothing is written outside.

The words are those that ``nnunet-cil`` puts after ``error:``. ``pytest -m fuzz`` tries twenty times as many.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_cil.chain import JOINT, Chain
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.cli.main import ERRORS
from nnunet_cil.convert import msd, totalsegmentator
from nnunet_cil.export import CARD_FILE, read_card, verify_export
from nnunet_cil.given_model import read_model
from nnunet_cil.lineage import Files, sealed, teacher_link, verify_chain, write_lineage
from nnunet_cil.nnunet_api import build_network
from nnunet_cil.report.collect import collect
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import LINEAGE_FILE, write_json
from nnunet_cil.teacher import load_teacher, sha256_of
from tests.convert.made_up import TOTAL_ORGANS, make_msd, make_totalsegmentator
from tests.fuzz.damage import in_bytes, in_file, in_json, in_structure, in_zip
from tests.report.chain_files import open_chain, store, write_chain
from tests.test_schedule import write_raw

IN_OUR_WORDS = re.compile(r"(^|\n|: )got ")
MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
ROOTS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2,
        "features_per_stage": [2, 4],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
}
PLANS = {
    "plans_name": "nnUNetPlans",
    "dataset_name": "Dataset001_Organs",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "label_manager": "LabelManager",
    "configurations": {
        "3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "batch_size": 2,
            "patch_size": [16, 16, 16],
            "spacing": [1.0, 1.0, 1.0],
            "architecture": ARCHITECTURE,
        },
        "3d_other": {"inherits_from": "3d_fullres", "batch_size": 3},
    },
}
DATASET_JSON = {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
SCHEDULE = {
    "name": "chain",
    "source": "Dataset001_Organs",
    "images": "disjoint",
    "unlabelled": "lacking.csv",
    "test": [["s3"], {"dataset": 2, "classes": {"liver": "liver"}}, {"images": "raw", "labels": "raw"}],
    "configuration": "3d_fullres",
    "fold": [0, 1],
    "plans": {
        "patch_size": [16, 16, 16],
        "features_per_stage": [4, 8, 8],
        "spacing": [1, 1, 2.5],
        "base": "plans.json",
    },
    "intensity": {"given": {0: {"mean": 1, "std": 2.5, "percentile_00_5": -1000, "percentile_99_5": 1500}}},
    "mirror_axes": [0, 1],
    "training": {"epochs": 3, "seed": 1, "later_lr": 1e-3, "amp": "off"},
    "method": {"lambda_pgcd": 2, "pseudo_labels": "online", "fusion": "auto"},
    "variants": {"strong": {"lambda_pgcd": 3, "trainer": "nnUNetTrainerPLOP"}},
    "nsd_tolerance_mm": 1.5,
    "dataset_id": 600,
    "device": "cpu",
    "steps": [["liver", "spleen"], ["right_kidney"]],
}
OWN_SCHEDULE = {
    "name": "own",
    "model": f"given/{MODEL}",
    "steps": [
        {"dataset": "Dataset001_Organs", "classes": {"spleen": "spleen", 3: None}, "unlabelled": "lacking.json"},
        {"dataset": 3, "classes": ["lung"]},
    ],
    "test": {"dataset": 2, "subjects": ["t1"], "classes": ["liver"]},
    "fold": "all",
}
LISTED = {name: {"images": [f"images/{name}.nii.gz"], "label": f"labels/{name}.nii.gz"} for name in ("l1", "l2")}


@dataclass
class Place:
    """What a target works on.

    Attributes:
        root: holds everything; nothing in it may change but below ``target`` and ``damaged`` files.
        files: by name, what may be damaged.
        extra: whatever a target needs beside.
    """

    root: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    extra: Any = None


def write_datasets(root: Path) -> None:
    """Three raw datasets of empty files, the files that schedules name, and a given model."""
    raw = root / "nnUNet_raw"
    write_raw(raw / "Dataset001_Organs")
    write_raw(raw / "Dataset002_Test", labels=("liver",), subjects=("t1", "t2"), test_subjects=("u1",))
    write_raw(raw / "Dataset003_Listed", labels=("lung",), dataset=LISTED)
    (root / "raw").mkdir()
    (root / "lacking.csv").write_text("case,class\ns1,spleen\ns2,3\n")
    (root / "lacking.json").write_text(json.dumps({"s1": ["spleen"], "s2": ["1"]}))
    (root / "split.json").write_text(json.dumps({"train": ["s1"], "test": ["s2", "s3"]}))
    (root / "plans.json").write_text(json.dumps(PLANS))
    write_given(root / "given")


def write_given(folder: Path) -> Path:
    """A model folder whose checkpoint is one."""
    model = folder / MODEL
    (model / "fold_all").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(PLANS))
    (model / "dataset.json").write_text(json.dumps(DATASET_JSON))
    torch.manual_seed(0)
    network = build_network(PLANS, DATASET_JSON, "3d_fullres", "nnUNetTrainer")
    init_args = {"configuration": "3d_fullres", "fold": "all", "plans": PLANS, "device": torch.device("cpu")}
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": init_args,
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, model / "fold_all" / "checkpoint_final.pth")
    store(("background", "liver"), 1).save(model / "fold_all" / "prototypes.npz")
    return model


def in_yaml(content: bytes, random: Random) -> bytes:
    if random.random() < 0.3:
        return in_bytes(content, random)
    try:
        return yaml.safe_dump(in_structure(yaml.safe_load(content), random), sort_keys=False).encode()
    except RecursionError:  # deeper than PyYAML writes
        return b"[" * 1000


def in_csv(content: bytes, random: Random) -> bytes:
    if random.random() < 0.5:
        return in_bytes(content, random)
    rows = in_structure(list(csv.reader(io.StringIO(content.decode("utf-8-sig")))), random)
    text = io.StringIO(newline="")
    for row in rows if isinstance(rows, list) else [rows]:
        text.write(";".join(map(str, row)) + "\n" if isinstance(row, list) else f"{row}\n")
    return text.getvalue().encode(errors="replace")


def in_pickle_or_bytes(name: str, content: bytes, random: Random) -> bytes:
    return in_bytes(content, random)


class Hostile:
    """What a pickle can do: call a function, here one that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def in_checkpoint(content: bytes, random: Random) -> bytes:
    """Damage to what a checkpoint holds, which may also be something that writes a file, or to its bytes."""
    if random.random() < 0.5:
        return in_zip(content, random, in_pickle_or_bytes)
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    hostile = random.random() < 0.3
    if hostile:
        places = [checkpoint, checkpoint["init_args"], checkpoint["network_weights"]]
        random.choice(places)[random.choice(("cil", "fold", "decoder"))] = Hostile(Path(os.environ["HOSTILE"]))
    else:
        checkpoint = in_structure(checkpoint, random)
    file = io.BytesIO()
    try:
        torch.save(checkpoint, file)
    except (RuntimeError, pickle.PicklingError, UnicodeEncodeError):
        return content
    return file.getvalue()


def in_model(content: bytes, random: Random) -> bytes:
    def in_entry(name: str, data: bytes, random: Random) -> bytes:
        return in_json(data, random) if name.endswith(".json") else in_bytes(data, random)

    return in_zip(content, random, in_entry)


# Each target: what is damaged and how, and what then reads it.


def prepare_datasets(root: Path) -> Place:
    write_datasets(root)
    (root / "schedule.yaml").write_text(yaml.safe_dump(SCHEDULE, sort_keys=False))
    (root / "own.yaml").write_text(yaml.safe_dump(OWN_SCHEDULE, sort_keys=False))
    names = ("schedule.yaml", "own.yaml", "lacking.csv", "lacking.json", "plans.json")
    raw = {
        f"{n}.json": root / "nnUNet_raw" / name / "dataset.json"
        for n, name in enumerate(("Dataset001_Organs", "Dataset002_Test", "Dataset003_Listed"), 1)
    }
    assert load_schedule(root / "schedule.yaml").classes == ("liver", "spleen", "right_kidney")
    assert load_schedule(root / "own.yaml").classes == ("liver", "spleen", "lung")
    return Place(root, {**{name: root / name for name in names}, **raw})


def read_schedules(place: Place, name: str) -> None:
    for schedule in ("own.yaml", "schedule.yaml") if name != "schedule.yaml" else ("schedule.yaml",):
        json.dumps(load_schedule(place.root / schedule).to_dict())


def prepare_model(root: Path) -> Place:
    model = write_given(root / "given")
    content = {"name": "x", "labels": {"liver": 1}, "steps": [{"classes": ["liver"], "training_subjects": 3}]}
    content |= {"scores": {"fold_all": {"mean_dice": {"liver": 0.5}, "test_subjects": 2}}, "versions": {"torch": "2"}}
    files = [path for path in model.rglob("*") if path.is_file()]
    sha256 = {path.relative_to(model).as_posix(): sha256_of(path) for path in files}
    write_json(model / CARD_FILE, sealed({**content, "sha256": sha256}))
    archive = root / "model.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in [*files, model / CARD_FILE]:
            zipped.write(path, f"Dataset001_X/{path.relative_to(model.parent).as_posix()}")
    names = ("plans.json", "dataset.json", CARD_FILE, "fold_all/checkpoint_final.pth", "fold_all/prototypes.npz")
    return Place(root, {"model.zip": archive, **{name: model / name for name in names}}, model)


def read_models(place: Place, name: str) -> None:
    path = place.root / "model.zip" if name == "model.zip" else place.extra
    attempts: list[Callable[[], Any]] = [lambda: read_card(path), lambda: list(verify_export(path, Files()))]
    for attempt in attempts:
        try:
            attempt()
        except ERRORS as error:
            check_words(error)
    read_model(path).install(place.root / "target" / MODEL, ["all"], check=read_checkpoint)
    load_teacher(place.root / "target" / MODEL, "all", "checkpoint_final.pth", torch.device("cpu"))


def prepare_loaded(root: Path) -> Place:
    model = write_given(root / "given")
    names = ("fold_all/checkpoint_final.pth", "fold_all/prototypes.npz", "plans.json", "dataset.json")
    return Place(root, {name: model / name for name in names}, model)


def load_loaded(place: Place, name: str) -> None:
    load_teacher(place.extra, "all", "checkpoint_final.pth", torch.device("cpu"))


def prepare_chain_files(root: Path) -> Place:
    """A chain of two steps with lineages, scores and all that a report reads."""
    chain = open_chain(root)
    variants = write_chain(chain, methods=("pgcd", "joint"))
    teacher = None
    for variant, step in ((variants[0], 1), (variants[0], 2), (variants[1], JOINT)):
        model = chain.model_folder(variant, step)
        block = {"chain": "tiny", "step": step, "settings": {}, "training": {}}
        write_json(model / "plans.json", {**PLANS, "cil": block})
        known = {name: sha256_of(model / "fold_all" / name) for name in ("checkpoint_final.pth", "prototypes.npz")}
        write_lineage(model / "fold_all", variant.trainer, root / "source" / "labelsTr", teacher, known)
        teacher = teacher_link(model / "fold_all", "checkpoint_final.pth", known["checkpoint_final.pth"], "tiny")
    assert list(verify_chain(chain.folder, Files()))
    found = [path for path in chain.paths["nnUNet_results"].rglob("*") if path.suffix in (".json", ".npz", ".txt")]
    return Place(root, {path.relative_to(root).as_posix(): path for path in found}, (chain, variants))


def read_chain_files(place: Place, name: str) -> None:
    chain, variants = place.extra
    for attempt in (lambda: list(verify_chain(chain.folder, Files())), lambda: Chain.open(chain.schedule)):
        try:
            attempt()
        except ERRORS as error:
            check_words(error)
    collect(chain, variants)


def prepare_public(root: Path) -> Place:
    task, total = make_msd(root), make_totalsegmentator(root)
    return Place(root, {"dataset.json": task / "dataset.json", "meta.csv": total / "meta.csv"}, (task, total))


def read_public(place: Place, name: str) -> None:
    task, total = place.extra
    if name == "meta.csv":
        totalsegmentator.find(total, TOTAL_ORGANS)
    else:
        msd.find(task)


def resealed(content: bytes, random: Random) -> bytes:
    """Damage to a sealed file, whose digest of itself then is right again: no accident, but somebody's work."""
    damaged = in_json(content, random)
    try:
        changed = json.loads(damaged)
        return json.dumps(sealed(changed)).encode() if isinstance(changed, dict) else damaged
    except (ValueError, RecursionError):
        return damaged


def how(name: str, random: Random) -> Callable[[bytes, Random], bytes]:
    if name.endswith((LINEAGE_FILE, CARD_FILE, "chain.json")) and random.random() < 0.8:
        return resealed
    endings = {".yaml": in_yaml, ".json": in_json, ".csv": in_csv, ".zip": in_model, ".pth": in_checkpoint}
    endings[".npz"] = lambda content, r: in_zip(content, r, in_pickle_or_bytes)
    return endings.get(Path(name).suffix, in_bytes)


TARGETS = {
    "schedules": (prepare_datasets, read_schedules, 6),
    "models": (prepare_model, read_models, 3),
    "teachers": (prepare_loaded, load_loaded, 2),
    "chains": (prepare_chain_files, read_chain_files, 2),
    "public sets": (prepare_public, read_public, 2),
}


def check_words(error: BaseException) -> None:
    assert IN_OUR_WORDS.search(str(error)), f"not in our words: {error!r}"


def snapshot(place: Place) -> dict[str, tuple]:
    """All files around a place, but for the target's, with time and size."""
    found: dict[str, tuple] = {}
    for folder, folders, names in os.walk(place.root.parent):
        if Path(folder) == place.root:
            folders.remove("target")
        for name in [*names, *folders]:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_mtime_ns, status.st_size) if name in names else ()
    return found


@contextmanager
def damaged(path: Path, random: Random, damage: Callable[[bytes, Random], bytes]) -> Iterator[None]:
    content = path.read_bytes()
    try:
        in_file(path, random, damage)
        yield
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Iterator[Callable[[str], Place]]:
    """Prepares what a target works on, once."""
    known: dict[str, Place] = {}
    with pytest.MonkeyPatch.context() as patch:

        def place_of(target: str) -> Place:
            root = known[target].root if target in known else tmp_path_factory.mktemp("fuzz") / "root"
            for name in ROOTS:
                (root / name).mkdir(parents=True, exist_ok=True)
                patch.setenv(name, str(root / name))
            patch.setenv("HOSTILE", str(root / "written_by_a_pickle"))
            if target not in known:
                known[target] = TARGETS[target][0](root)
            return known[target]

        yield place_of


def attempt(place: Place, read: Callable[[Place, str], None], random: Random) -> None:
    """Damage one file and read it: success, or an error in our words; and nothing is written elsewhere."""
    name = random.choice(sorted(place.files))
    shutil.rmtree(place.root / "target", ignore_errors=True)
    (place.root / "target").mkdir()
    with damaged(place.files[name], random, how(name, random)):
        before = snapshot(place)
        try:
            read(place, name)
        except ERRORS as error:
            check_words(error)
        after = snapshot(place)
    assert after == before


@pytest.mark.fuzz
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_read_or_refused(target, places):
    place = places(target)

    @settings(max_examples=TARGETS[target][2] * settings.default.max_examples, deadline=None)
    @given(seed=st.integers(0, 2**63))
    def tried(seed):
        attempt(place, TARGETS[target][1], Random(seed))

    tried()
