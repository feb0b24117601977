"""What a training was made of, in a file beside its checkpoint, and whether all of that is still what it was.

A ``lineage.json`` holds digests of what its training read and wrote, and that of its teacher's ``lineage.json``: the
links of a chain that one digest stands for. Nothing in it is absolute, so a chain may be moved. The digests find damage
and mix-ups; they are no signatures.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_cil.block import BLOCK_KEY
from nnunet_cil.step_files import CHECKPOINT, LINEAGE_FILE, PROTOTYPE_FILE, STEP_FILE, write_json
from nnunet_cil.teacher import sha256_of
from nnunet_cil.untrusted import EXPECTED_ENDING, MAX_JSON_BYTES, check_extent, is_ending, is_name, read_json

CHAIN_FILE = "chain.json"
FORMAT = 1
GIVEN = "given"
CHANGEABLE_KEYS = frozenset({"device", "test", "variants", "nsd_tolerance_mm", "guard"})
"""Keys of a schedule that are no part of a training that was done."""
CHAIN_EXPECTED = "what nnunet-cil wrote there. Put the original back, or remove the chain's folders to start anew"
PACKAGES = ("nnunet-cil", "nnunetv2", "torch", "numpy")
_SEAL = "digest"
_CHAIN_LISTS = ("datasets", "forgotten", "mirror_axes")
_MODEL_FILES = ("plans.json", "dataset.json")
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
_AnyPath = Path | zipfile.Path


def _read(path: _AnyPath) -> str:
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
    return text.decode()


def _parsed(text: str) -> Any:
    """JSON with its numbers as text, as a digit beyond a float's precision is one that may be damaged; 1.0 is 1."""

    def as_written(number: str) -> str:
        return number.removesuffix(".0")

    return json.loads(text, parse_float=as_written, parse_int=as_written)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _known(now: Any, then: Any) -> Any:
    """``now`` without the keys that ``then`` does not have: settings that a later version added."""
    if isinstance(now, dict) and isinstance(then, Mapping):
        return {key: _known(value, then[key]) for key, value in now.items() if key in then}
    return now


def _valued(content: Any) -> Any:
    """Without the keys that are None: a later version may add some."""
    if isinstance(content, dict):
        return {key: _valued(value) for key, value in content.items() if value is not None}
    return [_valued(value) for value in content] if isinstance(content, list) else content


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able content with the SHA-256 of all the rest of it as ``digest``."""
    rest = {key: value for key, value in content.items() if key != _SEAL}
    return {**rest, _SEAL: _digest(_parsed(json.dumps(rest)))}


def read_sealed(path: _AnyPath) -> dict[str, Any]:
    """A JSON file that `sealed` made.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was changed or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no file, expected the one that nnunet-cil wrote there.")
    try:
        text = _read(path)
        content, plain = _parsed(text), json.loads(text)
        check_extent(plain)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: got a file that cannot be read ({error}), expected JSON.") from error
    expected = content.pop(_SEAL, None) if isinstance(content, dict) else None
    if expected is None:
        raise ValueError(
            f"{path}: got content without a digest of itself, expected one. The file is damaged, or an earlier version "
            "of nnunet-cil wrote it: `nnunet-cil prepare` writes chain.json anew."
        )
    if (got := _digest(content)) != expected:
        raise ValueError(
            f"{path}: got content of sha256 {got}, expected {expected} as it says itself. It was changed or damaged: "
            "put the original back."
        )
    return plain


def check_chain(content: Mapping[str, Any], path: _AnyPath) -> None:
    """Refuse the content of a ``chain.json`` that has not its form, or whose names lead out of their folders.

    Raises:
        ValueError: saying what is wrong.
    """
    schedule, plans_name = content.get("schedule"), content.get("plans_name")
    problem = None
    if not is_name(content.get("name")) or not (plans_name is None or is_name(plans_name)):
        problem = "another name than of a chain and of plans"
    elif not _has(schedule, {"method": dict, "training": dict, "steps": list}) or not all(
        isinstance(step, dict) for step in schedule["steps"]
    ):
        problem = "no settings and steps"
    elif not _has({"forgotten": [], "mirror_axes": [], **content}, dict.fromkeys(_CHAIN_LISTS, list)):
        problem = f"no lists under {', '.join(_CHAIN_LISTS)}"
    elif len(content["datasets"]) < len(schedule["steps"]) + (schedule.get("model") is not None) or not all(
        isinstance(number, int) and 0 < number < 1000 for number in [*content["datasets"], content.get("joint")]
    ):
        problem = "other dataset numbers than one a step and one for joint"
    if problem:
        raise ValueError(f"{path}: got {problem}, expected {CHAIN_EXPECTED}.")


def _has(content: Any, kinds: Mapping[str, type]) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(key), kind) for key, kind in kinds.items())


def _check_form(content: Mapping[str, Any], source: _AnyPath) -> None:
    """Refuse a lineage that has not its form, or whose names lead out of their folders.

    Raises:
        ValueError: it is so.
    """
    block, teacher = content.get(BLOCK_KEY), content.get("teacher")
    is_own = "exported_from" not in content
    good = (
        {BLOCK_KEY, "teacher", "chain"} <= set(content)
        and _has(content, {"folder": str, "files": dict, "labels": dict})
        and (not is_own or _has(content["labels"], {"files": dict}))
        and (is_own or _has(content.get("exported_from"), {"lineage": str}))
        and (block is None or _has(block, {"settings": dict, "training": dict}))
        and (teacher is None or _has(teacher, {"folder": str, "files": dict, "lineage": str}))
    )
    labels = content.get("labels")
    good = good and isinstance(labels.get("counted_by", {}), dict)
    names = [*content["files"], *labels.get("files", ()), *labels.get("counted_by", ())] if good else []
    names += [*teacher["files"], *teacher["folder"].split("/")] if good and teacher is not None else []
    names += content["folder"].split("/") if good else []
    names += [content["exported_from"]["lineage"]] if good and not is_own else []
    if not good or not all(map(is_name, names)):
        raise ValueError(f"{source}: got content or names that are none of a lineage, expected what a training writes.")


def _plans_digest(path: _AnyPath, block: Mapping[str, Any] | None) -> str:
    """Of the content of a model's plans.json or dataset.json; of the block, the settings that ``block`` has."""
    content = _parsed(_read(path))
    if block is not None and BLOCK_KEY in content:
        content[BLOCK_KEY] = _known(content[BLOCK_KEY], block)
    return _digest(content)


def _chain_digest(path: Path, block: Mapping[str, Any]) -> str:
    """Of what in chain.json may not change while a chain runs; which cases lack labels, the step's file says."""
    content = _parsed(_read(path))
    schedule = {k: v for k, v in content["schedule"].items() if k not in {*CHANGEABLE_KEYS, "unlabelled"}}
    schedule["steps"] = [{k: v for k, v in step.items() if k != "unlabelled"} for step in schedule["steps"]]
    for key, then in (("method", block.get("settings", {})), ("training", block.get("training", {}))):
        schedule[key] = _known(schedule[key], then)
    numbers = {key: content.get(key) for key in ("datasets", "joint", "plans_name", "mirror_axes", "network_of")}
    return _digest(_valued({**numbers, "schedule": schedule}))


class Files:
    """Compares files with their digests; a file is read once. Its length is the number of files compared.

    Args:
        known: SHA-256 of files that were read before.
    """

    def __init__(self, known: Mapping[Path, str] | None = None) -> None:
        self._known = {str(path): digest for path, digest in (known or {}).items()}
        self._compared: set[str] = set()

    def __len__(self) -> int:
        return len(self._compared)

    def sha256(self, path: _AnyPath) -> str:
        """SHA-256 of a file's bytes."""
        if str(path) not in self._known:
            self._known[str(path)] = sha256_of(path)
        return self._known[str(path)]

    def read_sealed(self, path: _AnyPath) -> dict[str, Any]:
        """As `lineage.read_sealed`, and counted."""
        self._compared.add(str(path))
        return read_sealed(path)

    def check(
        self, path: _AnyPath, expected: str, source: _AnyPath, digest: Callable[[Any], str] | None = None
    ) -> None:
        """Compare a file with a digest that stands in ``source``.

        Args:
            digest: of the file; None takes the SHA-256 of its bytes.

        Raises:
            FileNotFoundError: it is gone.
            ValueError: it cannot be read, or differs.
        """
        self._compared.add(str(path))
        said = f", expected sha256 {expected} as {source} says"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: got no file{said}. Put it back, or train this step again.")
        try:
            got = (digest or self.sha256)(path)
        except (*_UNREADABLE, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: got a file that cannot be read ({error}){said}.") from error
        if got != expected:
            raise ValueError(
                f"{path}: got sha256 {got}{said}. It was changed, exchanged or damaged after the training: put the "
                "original back, or train this step and those after it again."
            )


def _place(fold: _AnyPath, name: str) -> _AnyPath:
    return (fold.parent if name in _MODEL_FILES else fold) / name


def _check(
    fold: _AnyPath, name: str, expected: str, source: _AnyPath, files: Files, block: Mapping[str, Any] | None
) -> None:
    digest = partial(_plans_digest, block=block) if name in _MODEL_FILES else None
    files.check(_place(fold, name), expected, source, digest)


def _folder_name(fold: Path) -> str:
    """``DATASET/MODEL/fold_X``, relative to nnUNet_results."""
    return "/".join(fold.parts[-3:])


def _how_labels_count(preprocessed: Path) -> dict[str, str]:
    """Digests of what decides which labels teach what: the classes that each case lacks, and the folds."""
    step, splits = preprocessed / STEP_FILE, preprocessed / "splits_final.json"
    found = {STEP_FILE: _labelled_digest(step)} if step.is_file() else {}
    return found | ({splits.name: _json_digest(splits)} if splits.is_file() else {})


def _labelled_digest(path: _AnyPath) -> str:
    return _digest(_parsed(_read(path)).get("labelled"))


def _json_digest(path: _AnyPath) -> str:
    return _digest(_parsed(_read(path)))


def _label_files(folder: Path, ending: str) -> dict[str, Path]:
    found = sorted(folder.iterdir()) if folder.is_dir() else ()
    return {path.name: path for path in found if path.name.endswith(ending) and not path.name.startswith(".")}


def versions() -> dict[str, str]:
    """Of Python and of the packages that a training depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_lineage(
    fold: Path, trainer: str, labels: Path, teacher: Mapping[str, Any] | None, known: Mapping[str, str]
) -> None:
    """Write the ``lineage.json`` of a training that has ended; whole or not at all.

    Args:
        fold: nnU-Net's folder ``fold_X`` with the checkpoint.
        trainer: name of its class.
        labels: folder with the label files of the step.
        teacher: of `teacher_link`; None at step 1.
        known: SHA-256 of checkpoint and prototypes, by file name.
    """
    plans, dataset_json = (json.loads(_place(fold, name).read_text(encoding="utf-8")) for name in _MODEL_FILES)
    block = plans.get(BLOCK_KEY)
    chain_file = None if block is None else fold.parents[2] / f"chain_{block['chain']}" / CHAIN_FILE
    label_digests = {name: sha256_of(path) for name, path in _label_files(labels, dataset_json["file_ending"]).items()}
    content = {
        "format": FORMAT,
        "folder": _folder_name(fold),
        "trainer": trainer,
        BLOCK_KEY: block,
        "versions": versions(),
        "files": {name: _plans_digest(_place(fold, name), block) for name in _MODEL_FILES} | dict(known),
        "labels": {
            "sha256": _digest(label_digests),
            "files": label_digests,
            "counted_by": _how_labels_count(labels.parent),
        },
        "chain": _chain_digest(chain_file, block) if chain_file is not None and chain_file.is_file() else None,
        "teacher": teacher,
    }
    write_json(fold / LINEAGE_FILE, sealed(content))


def exported(content: Mapping[str, Any], checkpoint_sha256: str) -> dict[str, Any]:
    """The lineage of an exported model: that of the training, without names of label files.

    Args:
        content: lineage of the training, which the result names.
        checkpoint_sha256: of the exported checkpoint.
    """
    labels = content["labels"]
    n_files = len(labels["files"]) if "files" in labels else labels["n_files"]
    return sealed(
        {
            **content,
            "files": {**content["files"], CHECKPOINT: checkpoint_sha256},
            "labels": {"sha256": labels["sha256"], "n_files": n_files},
            "exported_from": {"lineage": content[_SEAL], CHECKPOINT: content["files"][CHECKPOINT]},
        }
    )


def check_fold(fold: _AnyPath, files: Files, without_prototypes: bool = False) -> dict[str, Any]:
    """Compare the files of a fold with its lineage, and return that.

    Args:
        without_prototypes: whether these may be missing.

    Raises:
        FileNotFoundError, ValueError: a file is gone or differs, or the lineage is damaged or of another version.
    """
    source = fold / LINEAGE_FILE
    content = files.read_sealed(source)
    if content.get("format") != FORMAT:
        raise ValueError(f"{source}: got format {content.get('format')}, expected {FORMAT}: use a newer nnunet-cil.")
    _check_form(content, source)
    for name, expected in content["files"].items():
        if not (without_prototypes and name == PROTOTYPE_FILE and not (fold / name).is_file()):
            _check(fold, name, expected, source, files, content[BLOCK_KEY])
    return content


def _is_of(content: Mapping[str, Any], chain: str) -> bool:
    """Whether a model was trained in this chain; others were given to it."""
    return "exported_from" not in content and (content[BLOCK_KEY] or {}).get("chain") == chain


def _check_folder(fold: Path, content: Mapping[str, Any]) -> None:
    if content["folder"] != _folder_name(fold):
        raise ValueError(
            f"{fold / LINEAGE_FILE}: got the lineage of {content['folder']}, expected that of {_folder_name(fold)}. A "
            "fold was copied or renamed: train this one."
        )


def teacher_link(fold: Path, checkpoint: str, sha256: str, chain: str) -> dict[str, Any]:
    """What the lineage of a step says of its teacher, which is refused where it is not what its own lineage says.

    A model without a lineage was given: its own files are named instead.

    Args:
        fold: the teacher's folder ``fold_X``.
        checkpoint: its file name.
        sha256: of the checkpoint.
        chain: name of the chain that is trained.

    Raises:
        ValueError: the teacher does not fit its lineage, or is of another fold; both sides are named.
    """
    files = Files({fold / checkpoint: sha256})
    own = {name: files.sha256(fold / name) for name in (checkpoint, PROTOTYPE_FILE) if (fold / name).is_file()}
    if (fold / LINEAGE_FILE).is_file():
        try:
            content = check_fold(fold, files, without_prototypes=True)
            if _is_of(content, chain):
                _check_folder(fold, content)
        except (OSError, ValueError) as error:
            raise ValueError(f"teacher: {error}") from error
        lineage = content[_SEAL]
    else:
        lineage, own = GIVEN, {name: _plans_digest(_place(fold, name), None) for name in _MODEL_FILES} | own
    return {"folder": _folder_name(fold), "lineage": lineage, "files": own}


def verify_chain(folder: Path, files: Files) -> Iterator[str]:
    """Compare everything in a chain with what its lineages say; a line for each link that fits.

    Args:
        folder: ``chain_NAME`` in nnUNet_results, anywhere.
        files: takes what is compared.

    Raises:
        FileNotFoundError, ValueError: the first link that does not fit, or there is none.
    """
    folder = folder.absolute()
    results = folder.parent
    chain = files.read_sealed(folder / CHAIN_FILE)
    check_chain(chain, folder / CHAIN_FILE)
    dataset_name = glob.escape(chain["name"].replace("-", "_"))
    found = False
    for number in [*chain["datasets"], chain["joint"]]:
        given = number == chain["datasets"][0] and chain["schedule"].get("model") is not None
        for fold in sorted(results.glob(f"Dataset{number:03d}_{dataset_name}_*/*__*__*/fold_*")):
            if (fold / LINEAGE_FILE).is_file():
                yield _verify_link(fold, folder / CHAIN_FILE, chain["name"], files)
                found = True
            elif given:
                yield f"{_folder_name(fold)}: given, without a lineage; the steps after it name its files"
            elif (fold / PROTOTYPE_FILE).is_file():
                raise FileNotFoundError(
                    f"{fold / LINEAGE_FILE}: got no file, expected the lineage of this training. It was removed, or "
                    "an earlier version of nnunet-cil trained here, which cannot be verified."
                )
    if not found:
        raise FileNotFoundError(f"{folder}: got no {LINEAGE_FILE}, expected a chain with a finished training.")


def _verify_link(fold: Path, chain_file: Path, chain: str, files: Files) -> str:
    source = fold / LINEAGE_FILE
    content = check_fold(fold, files)
    summary = f"{_folder_name(fold)}: {len(content['files'])} files"
    if not _is_of(content, chain):
        return f"{summary}; given, made in another chain"
    _check_folder(fold, content)
    if content["chain"] is not None:
        files.check(chain_file, content["chain"], source, partial(_chain_digest, block=content[BLOCK_KEY]))
    labels = content["labels"]
    summary += ", " + _verify_labels(fold, labels["files"], labels.get("counted_by", {}), files)
    teacher = content["teacher"]
    if teacher is None:
        return summary
    own = chain_file.parents[1] / teacher["folder"]
    for name, expected in teacher["files"].items():
        _check(own, name, expected, source, files, None)
    if teacher["lineage"] != GIVEN:
        files.check(own / LINEAGE_FILE, teacher["lineage"], source, lambda path: read_sealed(path)[_SEAL])
    return f"{summary}; teacher {teacher['folder']}"


def _verify_labels(fold: Path, expected: Mapping[str, str], counted_by: Mapping[str, str], files: Files) -> str:
    """Compare the labels of a step wherever they still are: in the raw dataset, and beside the preprocessed one.

    Args:
        counted_by: see `_how_labels_count`; empty in lineages of earlier versions.
    """
    path = _place(fold, "dataset.json")
    if not is_ending(ending := read_json(path, "that of a model").get("file_ending")):
        raise ValueError(f"{path}: got the file_ending {ending!r}, expected {EXPECTED_ENDING}.")
    raw, preprocessed = _data_folders(fold.parents[2])
    dataset = fold.parts[-3]
    places = (raw / dataset / "labelsTr", preprocessed / dataset / "gt_segmentations")
    there = {folder: found for folder in places if (found := _label_files(folder, ending))}
    for folder, found in there.items():
        if added := sorted(set(found) - set(expected)):
            raise ValueError(
                f"{folder / added[0]}: got a label file that {fold / LINEAGE_FILE} does not know, expected only those "
                "that were trained on. Remove it."
            )
        for name, digest in expected.items():
            files.check(folder / name, digest, fold / LINEAGE_FILE)
    if places[1] in there:
        for name, digest in counted_by.items():
            of = _labelled_digest if name == STEP_FILE else _json_digest
            files.check(places[1].parent / name, digest, fold / LINEAGE_FILE, of)
    return f"{len(expected)} label files" if there else "label files are gone: not checked"


def _data_folders(results: Path) -> tuple[Path, Path]:
    """nnUNet_raw and nnUNet_preprocessed: of the environment if these are its results, else beside them."""
    names = ("nnUNet_raw", "nnUNet_preprocessed")
    home = os.environ.get("nnUNet_results")  # noqa: SIM112  (nnU-Net's spelling)
    if home and Path(home).resolve() == results.resolve():
        raw, preprocessed = (Path(os.environ.get(name) or results.parent / name) for name in names)
    else:
        raw, preprocessed = (results.parent / name for name in names)
    return raw, preprocessed
