"""The one gateway to nnunetv2's internals beside the trainer class.

Whatever we call of nnU-Net's planning, preprocessing, prediction, metrics and file handling is called here, so that a
new nnU-Net release is a matter of this file, ``trainer.py`` with its ``logging_terms.py``, and
``tests/test_nnunet_contract.py``.
"""

from __future__ import annotations

import gzip
import inspect
import io
import json
import logging
import os
import pydoc
import re
import shlex
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from scipy import ndimage

from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.parallel import told, worker_count
from nnunet_cil.step_files import CHECKPOINT
from nnunet_cil.surface_scores import surface_scores
from nnunet_cil.untrusted import EXPECTED_NAME, dataset_json_of, is_name

logger = logging.getLogger(__name__)

UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, UnpicklingError)
"""What reading a model's files raises if they are truncated or of another program."""
PATH_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
NETWORK_PACKAGES = ("torch", "dynamic_network_architectures", "nnunetv2")
"""From where the classes may be that plans name; nnU-Net itself would import and call anything."""
TIFF = (".tif", ".tiff")
MAX_OF_NETWORK = 10_000  # stages, convolutions, features, kernel sizes


def nnunet_paths() -> dict[str, Path]:
    """nnU-Net's three folders from the environment, created where they do not exist.

    Raises:
        ValueError: one or more of nnUNet_raw, nnUNet_preprocessed, nnUNet_results are not set.
    """
    if unset := [name for name in PATH_VARIABLES if not os.environ.get(name)]:
        lines = "\n".join(f"  export {name}=/path/to/{name}" for name in unset)
        raise ValueError(f"{', '.join(unset)}: got nothing, expected a folder. Set nnU-Net's paths, e.g.\n{lines}")
    paths = {name: Path(os.environ[name]).absolute() for name in PATH_VARIABLES}
    for path in paths.values():
        path.mkdir(parents=True, exist_ok=True)
    return paths


def taken_dataset_ids() -> dict[int, set[str]]:
    """Dataset numbers in use in any of nnU-Net's three folders, with the folder names that use them."""
    taken: dict[int, set[str]] = {}
    for path in nnunet_paths().values():
        for folder in path.glob("Dataset[0-9][0-9][0-9]_*"):
            taken.setdefault(int(folder.name[7:10]), set()).add(folder.name)
    return taken


def training_cases(raw_folder: Path) -> dict[str, tuple[list[Path], Path]]:
    """Cases of a raw dataset: ``{case: (image files by channel, label file)}``, as nnU-Net lists them.

    Without the twelve processes that nnU-Net forks for it, which take most of a second. Nothing is checked to exist
    beyond what nnU-Net lists.

    Raises:
        ValueError: a case's name leads out of its folder, as one under ``dataset`` in dataset.json can.
    """
    from nnunetv2.utilities import utils

    dataset_json = dataset_json_of(raw_folder)
    if "dataset" in dataset_json:
        named = utils.get_filenames_of_train_images_and_targets(str(raw_folder), dataset_json)
        listed = {
            str(case): ([Path(image) for image in files["images"]], Path(files["label"]))
            for case, files in named.items()
        }
    else:
        folder, ending = raw_folder / "imagesTr", dataset_json["file_ending"]
        images = image_lists(folder, ending)
        listed = {
            case: ([path for path in images.get(case, []) if path.is_file()], raw_folder / "labelsTr" / (case + ending))
            for case in map(str, utils.get_identifiers_from_splitted_dataset_folder(str(folder), ending))
        }
    if bad := [case for case in listed if not is_name(case)]:
        raise ValueError(f"{raw_folder}: got the case {bad[0]!r}, expected names of {EXPECTED_NAME}.")
    return listed


def image_lists(folder: Path, file_ending: str) -> dict[str, list[Path]]:
    """Images of a folder in nnU-Net's naming: ``{case: files by channel}``, sorted."""
    suffix = len("_0000") + len(file_ending)
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(file_ending) and re.fullmatch(r"_\d{4}", path.name[-suffix : -len(file_ending)]):
            found.setdefault(path.name[:-suffix], []).append(path)
    return found


def spacing_file(path: Path, is_label: bool = False) -> Path | None:
    """Where nnU-Net reads the spacing of a TIFF, ``CASE.json`` for ``CASE_0000.tif`` and the label ``CASE.tif``.

    None where there is no such file.
    """
    found = path.with_name((path.stem if is_label else path.stem[: -len("_0000")]) + ".json")
    return found if path.suffix.lower() in TIFF and found.is_file() else None


def reader_writer(dataset_json: Mapping[str, Any], example: Path) -> Any:
    """An instance of the reader/writer that nnU-Net takes for ``example``."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    with redirect_stderr(io.StringIO()):  # a traceback of each reader that nnU-Net tries in vain
        return determine_reader_writer_from_dataset_json(dict(dataset_json), str(example), verbose=False)()


def can_read(reader: Any, file_ending: str) -> bool:
    """Whether nnU-Net has an image reader of this name, and files of this type are among its own."""
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    try:
        found = recursive_find_reader_writer_by_name(reader)
    except (RuntimeError, TypeError):  # not there, or no text
        return False
    return file_ending.lower() in getattr(found, "supported_file_endings", ())


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a block and restore it after."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def plan(dataset_id: int, planner: str) -> str:
    """Plan a raw dataset with the planner of this class name; returns the plans identifier.

    Raises:
        ValueError: nnU-Net has no such planner.
    """
    import nnunetv2
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    planner_class = recursive_find_python_class(folder, planner, current_module="nnunetv2.experiment_planning")
    if planner_class is None:
        raise ValueError(
            f"plans: planner: got {planner!r}, expected a planner of nnunetv2 such as ExperimentPlanner or "
            "nnUNetPlannerResEncM. Correct the name in the schedule."
        )
    # the planner calls torch.set_num_threads(nnUNet_n_proc_DA), which fails at 0
    with environment_variable("nnUNet_n_proc_DA", str(worker_count(8))):
        return plan_experiment_dataset(dataset_id, planner_class)[1]


def pool_and_kernels(spacing_mm: Sequence[float], patch_size: Sequence[int]) -> tuple[list, list, tuple[int, ...]]:
    """Strides, kernel sizes and the patch size padded to their multiple, by nnU-Net's own rule."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, padded, _ = get_pool_and_conv_props(list(spacing_mm), list(patch_size), 4, 999999)
    return [list(s) for s in strides], [list(k) for k in kernels], tuple(int(p) for p in padded)


@dataclass(frozen=True)
class Crop:
    """What nnU-Net crops an image to: the box around its nonzero voxels, and which voxels in the box are nonzero.

    Args:
        spacing_mm: of the image's axes as read.
        shape_before, shape: of the image and of the box, axes as read.
    """

    spacing_mm: tuple[float, ...]
    shape_before: tuple[int, ...]
    shape: tuple[int, ...]
    packed_mask: bytes

    @property
    def mask(self) -> np.ndarray:
        """Boolean, of ``shape``."""
        bits = np.unpackbits(np.frombuffer(zlib.decompress(self.packed_mask), np.uint8), count=int(np.prod(self.shape)))
        return bits.reshape(self.shape).astype(bool)


def crop_case(images: np.ndarray, seg: np.ndarray, spacing_mm: Sequence[float]) -> tuple[np.ndarray, np.ndarray, Crop]:
    """Crop a case as nnU-Net does.

    Args:
        images: (C, *spatial); seg: (1, *spatial).

    Returns:
        Cropped images; int32 labels, -1 where they are 0 and the image is zero; what the crop was.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    cropped, outside, bbox = crop_to_nonzero(images, np.zeros_like(seg, dtype=np.int8))
    labels = seg[(slice(None), *(slice(*bounds) for bounds in bbox))].astype(np.int32)
    labels[(labels == 0) & (outside < 0)] = -1
    packed = zlib.compress(np.packbits(outside == 0).tobytes(), 1)
    return cropped, labels, Crop(tuple(map(float, spacing_mm)), images.shape[1:], cropped.shape[1:], packed)


def foreground_intensities(images: np.ndarray, seg: np.ndarray, n_samples: int) -> list[np.ndarray]:
    """nnU-Net's seeded sample of the intensities above label 0, by channel; empty without such a voxel.

    Args:
        images: (C, *spatial), cropped; seg: (1, *spatial).
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    sampled, _ = DatasetFingerprintExtractor.collect_foreground_intensities(seg, images, num_samples=n_samples)
    return [np.asarray(values) for values in sampled]


def write_fingerprint(path: Path, crops: Sequence[Crop], intensities: Sequence[Sequence[np.ndarray]]) -> None:
    """nnU-Net's ``dataset_fingerprint.json`` from what was measured in each case.

    Args:
        crops: by case; intensities: by case and channel.
    """
    from batchgenerators.utilities.file_and_folder_operations import save_json

    by_channel = [np.concatenate([case[channel] for case in intensities]) for channel in range(len(intensities[0]))]
    ratios = [np.prod(crop.shape) / np.prod(crop.shape_before) for crop in crops]
    fingerprint = {
        "spacings": [list(crop.spacing_mm) for crop in crops],
        "shapes_after_crop": [list(crop.shape) for crop in crops],
        "foreground_intensity_properties_per_channel": {
            str(channel): intensity_properties(values) for channel, values in enumerate(by_channel)
        },
        "median_relative_size_after_cropping": float(np.median(ratios)),
    }
    save_json(fingerprint, str(path))


def intensity_properties(values: np.ndarray, tail_percent: float = 0.5) -> dict[str, float]:
    """The numbers that nnU-Net's plans hold of a channel; ``tail_percent`` on each side lies outside the CT window."""
    low, middle, high = np.percentile(values, (tail_percent, 50.0, 100 - tail_percent))
    return {
        "mean": float(np.mean(values)),
        "median": float(middle),
        "std": float(np.std(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }


def preprocess_case(
    images: Sequence[Path],
    label: Path | None,
    target: Path,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    """Preprocess a case with nnU-Net's preprocessor into ``target``.b2nd, ``target``_seg.b2nd and ``target``.pkl.

    What an interrupted call left there is removed: blosc2 would fail on it.
    """
    for path in case_files(target.parent, target.name):
        path.unlink()
    manager = plans_manager(plans)
    chosen = manager.get_configuration(configuration)
    files = [str(path) for path in images]
    seg_file = None if label is None else str(label)
    chosen.preprocessor_class(verbose=False).run_case_save(
        str(target), files, seg_file, manager, chosen, dict(dataset_json)
    )


def can_derive(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], example: Path) -> bool:
    """Whether ``derive_case`` does as nnU-Net would: with its default preprocessor, and the reader that crops are of.

    Args:
        example: an image of the dataset.
    """
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    manager = plans_manager(plans)
    is_default = manager.get_configuration(configuration).preprocessor_class is DefaultPreprocessor
    return is_default and type(reader_writer(dataset_json, example)) is manager.image_reader_writer_class


def derive_case(
    donor: Path,
    label: Path,
    crop: Crop,
    target: Path,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    """What ``preprocess_case`` would write, from a preprocessed case of the same image with other labels.

    The image is linked (copied where the file system has no hard links). The labels take the way of nnU-Net's
    ``DefaultPreprocessor.run_case_npy``: transpose, crop, resample, class locations. The image file is not read. All
    values are nnU-Net's; class locations are kept as int16 where the image allows.

    Args:
        donor: preprocessed case without file ending; target: likewise.
        label: raw label file of this step.
        crop: of the image.
    """
    from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    manager = plans_manager(plans)
    chosen = manager.get_configuration(configuration)
    properties = load_pickle(f"{donor}.pkl")
    seg, _ = manager.image_reader_writer_class().read_seg(str(label))
    axes = manager.transpose_forward
    seg = seg.transpose([0, *[axis + 1 for axis in axes]])
    seg = seg[(slice(None), *(slice(*bounds) for bounds in properties["bbox_used_for_cropping"]))].copy()
    seg[(seg == 0) & ~crop.mask.transpose(axes)[None]] = -1
    before = [properties["spacing"][axis] for axis in axes]
    after = chosen.spacing if len(chosen.spacing) == len(before) else [before[0], *chosen.spacing]
    seg = chosen.resampling_fn_seg(seg, compute_new_shape(seg.shape[1:], before, after), before, after)
    labels = manager.get_label_manager(dict(dataset_json))
    locations = class_locations(seg, labels.foreground_labels, labels.has_ignore_label)
    small = np.int16 if max(seg.shape) < 2**14 else np.int64  # nnU-Net's int64 would be most of the step's disk space
    properties["class_locations"] = {
        label: found.astype(small) if isinstance(found, np.ndarray) else found for label, found in locations.items()
    }
    link_or_copy(Path(f"{donor}.b2nd"), Path(f"{target}.b2nd"))
    save_segmentation(seg, Path(f"{target}_seg"), chosen.patch_size)
    write_pickle(properties, f"{target}.pkl")


def link_or_copy(source: Path, target: Path, symbolic: bool = False) -> None:
    """Hard link a file, or copy it where the file system cannot; of a link, what it leads to.

    Args:
        symbolic: try a symbolic link before a copy, as of what stays where it is.
    """
    source = source.resolve()
    for make in (os.link, os.symlink) if symbolic else (os.link,):
        with suppress(OSError):
            return make(source, target)
    shutil.copyfile(source, target)


def crossval_splits(cases: Sequence[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's seeded 5-fold split; fewer folds below 5 cases; a single case is both training and validation."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    if len(cases) < 2:
        return [{"train": list(cases), "val": list(cases)}]
    folds = generate_crossval_split(sorted(cases), seed=12345, n_splits=min(5, len(cases)))
    return [{name: [str(case) for case in part] for name, part in fold.items()} for fold in folds]


def train_arguments(
    dataset: str, configuration: str, fold: int | str, trainer: str, plans_name: str, device: str
) -> list[str]:
    """Arguments of ``nnUNetv2_train`` for one training, as a user would type them."""
    arguments = [dataset, configuration, str(fold), "-tr", trainer]
    if plans_name != "nnUNetPlans":
        arguments += ["-p", plans_name]
    return arguments + (["-device", device] if device != "cuda" else [])


def trainer_class(name: str) -> Any:
    """nnU-Net's trainer class of this name: one of its own, or one in a folder of ``nnUNet_extTrainer``.

    Raises:
        ValueError: there is none.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        return recursive_find_trainer_class_by_name(name)
    except (RuntimeError, TypeError, AssertionError) as error:  # not there, no text, or no trainer
        raise ValueError(f"trainer: got {name!r}, which nnU-Net does not find: {error}") from error


def objective_of(name: str) -> Any:
    """The subclass of ``objectives.base.Objective`` of a trainer.

    Raises:
        ValueError: nnU-Net does not find the trainer, or it knows nothing of steps.
    """
    found = getattr(trainer_class(name), "objective_class", None)
    if found is None:
        raise ValueError(
            f"trainer: got {name}, expected a subclass of nnunet_cil's IncrementalTrainer, such as nnUNetTrainerPGCD."
        )
    return found


def train_process_command(arguments: Sequence[str], resume: bool) -> list[str]:
    """Command that runs ``nnUNetv2_train`` with these arguments in this interpreter."""
    code = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    return [sys.executable, "-u", "-c", code, *arguments, *(["--c"] if resume else [])]


def predict_line(
    dataset: str,
    configuration: str,
    folds: Sequence[int | str],
    trainer: str,
    plans_name: str,
    images: str,
    device: str,
) -> str:
    """The ``nnUNetv2_predict`` line that gives the same predictions."""
    parts = ["nnUNetv2_predict", "-i", images, "-o", "OUTPUT", "-d", dataset, "-c", configuration]
    parts += ["-f", *map(str, folds), "-tr", trainer, *(["-p", plans_name] if plans_name != "nnUNetPlans" else [])]
    return shlex.join(parts + (["-device", device] if device != "cuda" else []))


def model_folder_name(trainer: str, plans_name: str, configuration: str) -> str:
    """nnU-Net's name of a model folder."""
    return f"{trainer}__{plans_name}__{configuration}"


def predict(
    model_folder: Path,
    folds: Sequence[int | str],
    configuration: str,
    images: Mapping[str, Sequence[Path]],
    preprocessed: Path,
    output: Path,
    device: torch.device,
    say: Callable[[str], None] = logger.info,
) -> None:
    """What nnUNetv2_predict gives at its default settings; predictions that exist are kept.

    Args:
        folds: of the model; the mean of several is predicted.
        images: files by channel of each case.
        preprocessed: where the preprocessed cases are kept for the next model of the same plans.
        output: gets CASE.nii.gz (or the dataset's file ending), each whole or not at all.
        say: gets a line of progress now and then.

    Raises:
        ValueError: the model is truncated.
        RuntimeError: memory ran out.
        OSError: a prediction could not be written.
    """
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    output.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(device=device, allow_tqdm=False)
    try:
        for fold in folds:  # nnU-Net unpickles them
            read_checkpoint(model_folder / f"fold_{fold}" / CHECKPOINT, mapped=True)
        predictor.initialize_from_trained_model_folder(str(model_folder), tuple(folds), CHECKPOINT)
    except UNREADABLE as error:
        raise ValueError(
            f"{model_folder}: got an unreadable model ({type(error).__name__}: {error}), expected the finished one of "
            f"fold {fold}. Remove its fold_{fold} and train the step again."
        ) from error
    manager, chosen, dataset_json = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    ending = dataset_json["file_ending"]
    missing = [case for case in images if not (output / f"{case}{ending}").is_file()]
    # export resamples on the CPU, so beside a GPU the next case is predicted meanwhile
    with _one_by_one(beside=device.type == "cuda") as call:
        for case in told(missing, len(missing), say):
            with _enough_memory(case):
                _preprocess_once(images[case], preprocessed / case, manager.plans, configuration, dataset_json)
                data, _, _, properties = preprocessed_dataset(preprocessed).load_case(case)
                logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data[:])).cpu()

            def export(logits: torch.Tensor = logits, properties: dict = properties, case: str = case) -> None:
                partial = output / f".{case}.part"
                with _enough_memory(case):
                    export_prediction_from_logits(logits, properties, chosen, manager, dataset_json, str(partial))
                    written = Path(f"{partial}{ending}")
                    check_written(written, manager.image_reader_writer_class())
                if (spacing := spacing_file(written, is_label=True)) is not None:
                    os.replace(spacing, output / f"{case}.json")
                os.replace(written, output / f"{case}{ending}")

            call(export)


def _preprocess_once(
    images: Sequence[Path],
    stored: Path,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    """Preprocess images where that is not done; other models are predicted meanwhile, where trainings are jobs."""
    partial, last = stored.parent / "partial" / stored.name, Path(f"{stored}.pkl")
    if last.is_file():
        return
    partial.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{partial}.lock"):
        if not last.is_file():
            preprocess_case(images, None, partial, plans, configuration, dataset_json)
            for part in (".b2nd", "_seg.b2nd", ".pkl"):
                os.replace(f"{partial}{part}", f"{stored}{part}")


@contextmanager
def _one_by_one(beside: bool) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Give what calls its argument at once, or beside the caller in a thread, one after the other.

    In a thread one call works and one waits; the caller waits with a third, as each holds its logits. What a call
    raises is raised by one of the next two, or at the end.
    """
    if not beside:
        yield lambda work: work()
        return
    with ThreadPoolExecutor(1) as pool:
        given: deque[Future[None]] = deque()

        def call(work: Callable[[], None]) -> None:
            while len(given) > 1:
                given.popleft().result()
            given.append(pool.submit(work))

        yield call
        for future in given:
            future.result()


@contextmanager
def _enough_memory(case: str) -> Iterator[None]:
    """Say it in words if memory runs out in a prediction: Python's, NumPy's, a GPU's, or PyTorch's on the CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_pytorch = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not (isinstance(error, MemoryError) or is_pytorch):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"predicting {case}: got no memory ({said}), expected enough for this image and all its classes. The "
            "predictions before it are kept: end other programs, or take a machine with more, and give the same "
            "command again."
        ) from error


def read_to_the_end(path: Path) -> None:
    """Unpack a .gz file: SimpleITK takes the missing end of a truncated one for zeros.

    Raises:
        EOFError: it is truncated.
        OSError, zlib.error: bytes of it have changed.
    """
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while file.read(1 << 22):
                pass


def check_written(path: Path, rw: Any) -> None:
    """Read a segmentation that was just written: SimpleITK says nothing of a full disk.

    Args:
        rw: an instance of nnU-Net's reader/writer.

    Raises:
        OSError: it is not whole; it is removed.
    """
    try:
        read_to_the_end(path)
        rw.read_seg(str(path))
    except Exception as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"{path}: got a file that cannot be read after it was written ({type(error).__name__}), expected a whole "
            "one. Is the disk full? Make room, and give the same command again."
        ) from error


def case_metrics(
    reference: Path,
    prediction: Path,
    dataset_json: Mapping[str, Any],
    labels: Sequence[int],
    ignore: int | None,
    tolerance_mm: float,
) -> dict[int, dict[str, float]]:
    """nnU-Net's metrics of one case and our surface scores; voxels with the label ``ignore`` count in neither.

    Args:
        tolerance_mm: of the NSD.

    Returns:
        ``{label: {"Dice": 0..1 or NaN if both are empty, "n_ref": voxels, "n_pred": voxels, ..., "hd95_mm", "nsd"}}``;
        the last two as ``surface_scores`` gives them.
    """
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics

    rw = reader_writer(dataset_json, reference)
    found = compute_metrics(str(reference), str(prediction), rw, list(labels), ignore)["metrics"]
    (wanted, properties), (got, _) = rw.read_seg(str(reference)), rw.read_seg(str(prediction))
    boxes = [
        ndimage.find_objects(np.maximum(seg[0], 0).astype(np.int32), max(labels, default=0)) for seg in (wanted, got)
    ]
    for label in labels:
        of_both = [of_one[label - 1] for of_one in boxes if of_one[label - 1] is not None]
        around = [slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*of_both, strict=True)]
        here = (slice(None), *around[1:])  # in all slices: of a single one, which is an image in 2D, scores differ
        scored = np.True_ if ignore is None else wanted[0][here] != ignore
        masks = [(seg[0][here] == label) & scored for seg in (wanted, got)]
        found[label] |= surface_scores(*masks, properties["spacing"], tolerance_mm)
    return found


def plans_manager(plans: Mapping[str, Any]) -> Any:
    """nnU-Net's PlansManager of a plans dict."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(dict(plans))


def build_network(plans: Mapping[str, Any], dataset_json: Mapping[str, Any], configuration: str, trainer: str) -> Any:
    """The network that nnU-Net would build to predict with this model; no deep supervision, on the CPU.

    Raises:
        ValueError: nnU-Net does not find the trainer, or the plans name something else than modules.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    manager = plans_manager(plans)
    chosen = manager.get_configuration(configuration)
    check_architecture(plans, configuration)
    n_inputs = determine_num_input_channels(manager, chosen, dict(dataset_json))
    n_outputs = manager.get_label_manager(dict(dataset_json)).num_segmentation_heads
    return network_of(trainer, manager, chosen, n_inputs, n_outputs, enable_deep_supervision=False)


def check_architecture(plans: Mapping[str, Any], configuration: str) -> None:
    """Refuse plans whose network is not made of modules: nnU-Net imports what they name, and calls it.

    Raises:
        ValueError: they name anything but modules of ``NETWORK_PACKAGES``.
    """
    try:
        chosen = plans_manager(plans).get_configuration(configuration)
        parts = [chosen.network_arch_init_kwargs[key] for key in chosen.network_arch_init_kwargs_req_import]
        network = chosen.network_arch_class_name
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"plans: {configuration}: got no architecture that can be read ({error!r}), expected that of nnU-Net."
        ) from error
    for name in [network, *(part for part in parts if part is not None)]:
        known = isinstance(name, str) and name.split(".")[0] in NETWORK_PACKAGES
        found = _located(name, may_have_moved=name == network) if known else None
        if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
            raise ValueError(
                f"plans: {configuration}: architecture: got {name!r}, expected a module of {NETWORK_PACKAGES}, as "
                "nnU-Net calls what stands there. Do not use these plans, unless you know why they name it."
            )
    if large := [number for number in _whole_numbers(chosen.network_arch_init_kwargs) if number > MAX_OF_NETWORK]:
        raise ValueError(
            f"plans: {configuration}: architecture: got {large[0]}, expected stages, features and kernels of at most "
            f"{MAX_OF_NETWORK}."
        )


def _located(name: str, may_have_moved: bool) -> Any:
    """What nnU-Net takes for a dotted name, also where a network once lay in another module; None if nothing."""
    import dynamic_network_architectures
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return None
    if found is not None or not may_have_moved:
        return found
    folder = os.path.join(dynamic_network_architectures.__path__[0], "architectures")
    return recursive_find_python_class(folder, name.split(".")[-1], "dynamic_network_architectures.architectures")


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(child)


def network_of(
    trainer: str, manager: Any, configuration: Any, n_inputs: int, n_outputs: int, enable_deep_supervision: bool = True
) -> Any:
    """The network that a trainer builds, also one that has the older signature of nnU-Net's method.

    Args:
        manager: PlansManager; configuration: ConfigurationManager.

    Raises:
        ValueError: nnU-Net does not find the trainer.
    """
    build = trainer_class(trainer).build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(manager, configuration, n_inputs, n_outputs, enable_deep_supervision)
    return build(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        n_inputs,
        n_outputs,
        enable_deep_supervision,
    )


def has_own_network(trainer: str) -> bool:
    """Whether a trainer, none of ours, builds another network than nnU-Net's own from the same plans."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    found = trainer_class(trainer)
    ours = hasattr(found, "objective_class")
    return not ours and found.build_network_architecture is not nnUNetTrainer.build_network_architecture


class SlidingWindow:
    """nnU-Net's sliding-window inference of one network on preprocessed images.

    Args:
        network: any network without deep supervision; its ``training`` flag is restored after each call.
        mirror_axes: axes for test-time mirroring, None for none.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        plans: Mapping[str, Any],
        configuration: str,
        dataset_json: Mapping[str, Any],
        device: torch.device,
        mirror_axes: tuple[int, ...] | None = None,
    ) -> None:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        manager = plans_manager(plans)
        self.mirror_axes = mirror_axes
        self._predictor = nnUNetPredictor(device=device, allow_tqdm=False, use_mirroring=mirror_axes is not None)
        self._predictor.manual_initialization(
            network, manager, manager.get_configuration(configuration), None, dict(dataset_json), "", mirror_axes
        )

    def logits(self, image: np.ndarray) -> torch.Tensor:
        """Logits (K, *spatial) on the CPU, in nnU-Net's half precision, of a preprocessed image (C, *spatial)."""
        was_training = self._predictor.network.training
        result = self._predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(image[:])))
        self._predictor.network.train(was_training)
        return result.cpu().clone()  # without what it was padded with


def class_locations(seg: np.ndarray, labels: Sequence[int], with_annotated: bool) -> dict[Any, np.ndarray]:
    """Voxel positions by class for nnU-Net's foreground oversampling, drawn as its preprocessor draws them.

    Args:
        seg: (1, *spatial) integers.
        labels: foreground labels.
        with_annotated: add the entry of all annotated voxels that nnU-Net samples from when an ignore label is
            declared.
    """
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    wanted: list[Any] = list(labels)
    if with_annotated:
        wanted.append([-1, 0, *labels])
    return DefaultPreprocessor._sample_foreground_locations(seg, wanted)


def preprocessed_dataset(folder: Path, cases: Sequence[str] | None = None) -> Any:
    """nnU-Net's dataset object over all cases of a preprocessed folder, or over some."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    return infer_dataset_class(str(folder))(str(folder), None if cases is None else list(cases))


def fold_cases(folder: Path, fold: int | str) -> list[str]:
    """Training cases of a fold, from the ``splits_final.json`` beside a preprocessed folder; sorted.

    Raises:
        FileNotFoundError: the dataset is not there any more.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: got no such folder, expected the preprocessed cases that are to be kept.")
    splits = folder.parent / "splits_final.json"
    known = [] if fold == "all" else json.loads(splits.read_text(encoding="utf-8"))
    return training_part(preprocessed_dataset(folder).identifiers, known, fold)


def training_part(cases: Iterable[str], splits: Sequence[Mapping[str, Sequence[str]]], fold: int | str) -> list[str]:
    """Cases that nnU-Net trains a fold on, sorted; beyond the splits, four fifths, drawn with the fold as seed."""
    cases = sorted(cases)
    if fold == "all":
        return cases
    if int(fold) < len(splits):
        return sorted(splits[int(fold)]["train"])
    drawn = np.random.RandomState(12345 + int(fold)).choice(len(cases), int(len(cases) * 0.8), replace=False)
    return sorted(cases[i] for i in drawn)


def case_files(folder: Path, case: str) -> list[Path]:
    """A case's files in a preprocessed folder: image, segmentation, properties."""
    return [
        path
        for ending in (".b2nd", "_seg.b2nd", ".npz", ".npy", "_seg.npy", ".pkl")
        if (path := folder / f"{case}{ending}").is_file()
    ]


def save_segmentation(seg: np.ndarray, path_without_ending: Path, patch_size: Sequence[int]) -> None:
    """Write an int16 segmentation (1, *spatial) as blosc2, chunked for ``patch_size``, whole or not at all."""
    import blosc2
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

    target = Path(f"{path_without_ending}.b2nd")
    temporary = target.with_name(target.name + ".part")
    temporary.unlink(missing_ok=True)
    seg = np.ascontiguousarray(seg, dtype=np.int16)
    blocks, chunks = comp_blosc2_params(seg.shape, tuple(patch_size), seg.itemsize)
    blosc2.asarray(seg, urlpath=str(temporary), chunks=chunks, blocks=blocks, cparams={"nthreads": 1})
    os.replace(temporary, target)


def open_segmentation(path: Path) -> Any:
    """Open what ``save_segmentation`` wrote, memory-mapped where the system allows."""
    import blosc2

    mmap = {} if os.name == "nt" else {"mmap_mode": "r"}
    return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **mmap)


def split_4d(path: Path, folder: Path) -> None:
    """Write each channel of a NIfTI file of four dimensions as a file of its own, ``NAME_0000.nii.gz`` and so on."""
    from nnunetv2.dataset_conversion.convert_MSD_dataset import split_4d_nifti

    split_4d_nifti(str(path), str(folder))
