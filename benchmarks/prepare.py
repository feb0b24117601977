"""Time and disk space of a later step on the same images: ``python -m benchmarks.prepare [--source RAW_DATASET]``.

What is compared makes the same files, as a test holds: nnU-Net's fingerprint extraction and preprocessing of the step's
raw dataset, with as many worker processes as there are cores and, as starting these takes seconds, in this process too;
and ours, which links the images that step 1 has preprocessed. The three take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import yaml

from benchmarks.setting import machine, set_folders


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="a raw dataset of at least two classes (default: 14 phantoms)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        set_folders(Path(root))
        result = measure(args.source, args.rounds, Path(root))
    print("| step 2 of the same images | seconds | to ours | new bytes on disk |\n|---|---|---|---|")
    for name, row in result["rows"].items():
        print(f"| {name} | {row['seconds']:.2f} | {row['to_ours']:.1f} | {row['bytes']} |")
    print(f"\n{result['cases']} cases of {result['source']}; {result['machine']}, medians of {args.rounds} rounds")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(source: Path | None, rounds: int, root: Path) -> dict:
    """Prepare a two-step chain on ``source``, then its second step again and again, each way in turn."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset

    from nnunet_cil import dataset, nnunet_api
    from nnunet_cil.cases import step_cases
    from nnunet_cil.chain import Chain
    from nnunet_cil.parallel import worker_count
    from nnunet_cil.phantom import write_phantom
    from nnunet_cil.schedule import load_schedule
    from nnunet_cil.source_check import check_sources

    if source is None:
        source = root / "phantoms"
        write_phantom(source, n_train=14, n_test=0, shape=(40, 128, 128))
    classes = [
        name
        for name, value in json.loads((source / "dataset.json").read_text(encoding="utf-8"))["labels"].items()
        if value
    ]
    content = {"name": "bench", "source": str(source.absolute()), "steps": [classes[:-1], classes[-1:]]}
    (root / "bench.yaml").write_text(yaml.safe_dump(content))
    chain = Chain.open(load_schedule(root / "bench.yaml"))
    dataset.prepare_chain(chain, [chain.variant("pgcd", 0)])
    cases = {step: step_cases(chain.schedule, step) for step in (1, 2)}
    scans = check_sources(chain.schedule, cases)
    folder, number, n_cases = chain.preprocessed(2), chain.dataset_id(2), len(cases[2])
    plans_name = chain.content["plans_name"]
    workers = worker_count(n_cases)

    def ours() -> None:
        dataset._plan(chain, 2, cases[2], scans)
        dataset._preprocess(chain, 2, cases[2], scans)

    def nnunet_with_workers() -> None:
        extract_fingerprint_dataset(number, num_processes=workers, verbose=False, show_progress_bar=False)
        preprocess_dataset(number, plans_name, ("3d_fullres",), (workers,), show_progress_bar=False)

    def nnunet_in_this_process() -> None:
        plans = json.loads((folder / f"{plans_name}.json").read_text(encoding="utf-8"))
        dataset_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        target = folder / "nnUNetPlans_3d_fullres"
        shutil.rmtree(target)
        target.mkdir()
        for case, (images, label) in nnunet_api.training_cases(chain.raw(2)).items():
            reader = type(nnunet_api.reader_writer(dataset_json, images[0]))
            files = [str(path) for path in images]
            DatasetFingerprintExtractor.analyze_case(files, str(label), reader, 10**8 // n_cases)
            nnunet_api.preprocess_case(images, label, target / case, plans, "3d_fullres", dataset_json)

    ways = {
        "ours": ours,
        f"nnU-Net, {workers} worker processes": nnunet_with_workers,
        "nnU-Net, in this process": nnunet_in_this_process,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sizes = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = perf_counter()
            way()
            seconds[name].append(perf_counter() - started)
            files = [path for path in folder.rglob("*") if path.is_file()]
            sizes[name] = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
    rows = {
        name: {
            "seconds": median(seconds[name]),
            "to_ours": median(a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)),
            "bytes": sizes[name],
        }
        for name in ways
    }
    return {"source": source.name, "cases": n_cases, "machine": machine(torch.device("cpu")), "rows": rows}


if __name__ == "__main__":
    main()
