"""The loop over seeds, methods and steps: train what is not trained, score what is not scored, show where it stands."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from time import monotonic

import torch

from nnunet_cil import nnunet_api
from nnunet_cil.chain import JOINT, REPLAY_TRAINER, Chain, Variant, method_of, write_json
from nnunet_cil.dataset import block_of, prepare_chain, write_test_set
from nnunet_cil.environment import trainer_path_variable
from nnunet_cil.evaluate import collect_scores, evaluate_model, learned_at, subject_scores, write_matrices
from nnunet_cil.parallel import worker_count
from nnunet_cil.precision import amp_dtype
from nnunet_cil.report import write as report_page
from nnunet_cil.report.figures import plot_mean_dice
from nnunet_cil.report.paired import paired_table
from nnunet_cil.report.table import score_table
from nnunet_cil.schedule import ABLATIONS, Schedule

logger = logging.getLogger(__name__)

COMPARED = ("pgcd", "pseudo_kd", "pseudo", "plop", "mib", "ilt", "lwf", "ewf", "ewc", "finetune")
FEW_CORES = 4
WORKERS_VARIABLE = "nnUNet_n_proc_DA"


def variants_of(chain: Chain, methods: Sequence[str], seeds: Sequence[int | None]) -> list[Variant]:
    """Every method with every seed, seeds outermost; the schedule's own where none are named."""
    methods = list(dict.fromkeys(methods)) or [chain.default_method]
    seeds = list(dict.fromkeys(seeds)) or [chain.schedule.training.seed]
    return [chain.variant(method, seed) for seed in seeds for method in methods]


def compared_methods(schedule: Schedule) -> list[str]:
    """The chain's own method, the others that keep no scans, and the upper bound where the data allow one."""
    joint = [JOINT] if schedule.has_joint else []
    return list(dict.fromkeys([method_of(schedule.trainer), *COMPARED, *joint]))


def ablated_methods(schedule: Schedule) -> list[str]:
    """The chain's own method, whole and with one part left out at a time."""
    own = method_of(schedule.trainer)
    return [own, *(f"{own}-{name}" for name in ABLATIONS)]


def prepare(schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None]) -> list[str]:
    """Make all datasets and plans; returns the ``nnUNetv2_train`` lines to type, in their order."""
    chain = Chain.open(schedule)
    with chain.locked():
        variants = _prepared_variants(chain, methods, seeds)
    lines = {}
    for variant, step, fold in _trainings(chain, variants):
        if step in chain.forgotten or (step != JOINT and step not in schedule.own_steps):
            continue
        lines[shlex.join(["nnUNetv2_train", *_arguments(chain, variant, step, fold)])] = None
    return list(lines)


def run(schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None]) -> str:
    """Run a chain to its end from wherever it stands; returns the table.

    Interrupted at any time, the same call goes on: a training from its last checkpoint, all else from what is finished.
    """
    chain = Chain.open(schedule)
    with chain.locked():
        return _run(chain, methods, seeds)


def _run(chain: Chain, methods: Sequence[str], seeds: Sequence[int | None]) -> str:
    schedule = chain.schedule
    logger.info("chain %s in %s", schedule.name, chain.folder)
    _say_how(schedule)
    variants = _prepared_variants(chain, methods, seeds)
    todo = _trainings(chain, variants)
    started, trained = monotonic(), 0
    missing = sum(not chain.trained(variant, step, fold) for variant, step, fold in todo)
    for variant, step, fold in todo:
        if not chain.trained(variant, step, fold):
            label = f"[{trained + 1}/{missing}] {_title(chain, variant, step, fold)}"
            _train(chain, variant, step, fold, label)
            trained += 1
            if trained < missing:
                left = (monotonic() - started) / trained * (missing - trained)
                logger.info("%d of %d trainings done, about %s left", trained, missing, _duration(left))
        if schedule.test:
            with _nnunet_output(chain):
                evaluate_model(chain, variant, step, fold, device_of(schedule))
            report(chain, variants)
    return report(chain, variants)


def report(chain: Chain, variants: Sequence[Variant]) -> str:
    """Write scores.json, the matrices, the table and the figure of what is scored so far; returns the table."""
    if not chain.schedule.test:
        return "The schedule names no test set: nothing to score."
    content, rows = collect_scores(chain, list(variants))
    write_json(chain.folder / "scores.json", content)
    if not rows:
        return "Nothing is scored yet."
    classes, at = list(chain.schedule.classes), learned_at(chain)
    table = score_table(rows, classes, at)
    scores = subject_scores(chain, variants)
    if len(scores) > 1 and chain.default_method in scores:
        table += "\n" + paired_table(scores, chain.default_method, classes, at)
    write_matrices(chain, content)
    (chain.folder / "table.txt").write_text(table + "\n", encoding="utf-8")
    (chain.folder / "figures").mkdir(exist_ok=True)
    plot_mean_dice(rows, at, chain.folder / "figures" / "mean_dice.png")
    return table


def write_report(schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None]) -> Path:
    """Write ``report.html`` and all figures from what is there; returns the page."""
    chain = Chain.open(schedule)
    return report_page.write_report(chain, variants_of(chain, methods, seeds))


def evaluate(schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None]) -> str:
    """Score all models that are trained; returns the table.

    Raises:
        ValueError: the schedule names no test set, or nothing is trained.
    """
    chain = Chain.open(schedule)
    if not schedule.test:
        raise ValueError(f"{schedule.file}: test: got nothing, expected test images and labels to score.")
    variants = variants_of(chain, methods, seeds)
    todo = [entry for entry in _trainings(chain, variants) if chain.content["plans_name"] and chain.trained(*entry)]
    if not todo:
        raise ValueError(f"{chain.folder}: got no finished training, expected one. Start with `nnunet-cil run`.")
    with chain.locked(), _nnunet_output(chain):
        write_test_set(chain)
        for variant, step, fold in todo:
            evaluate_model(chain, variant, step, fold, device_of(schedule))
    return report(chain, variants)


def status(schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None]) -> str:
    """One line a training: waiting, at which epoch, or done."""
    chain = Chain.open(schedule)
    if not chain.content["plans_name"]:
        return f"chain {schedule.name}: nothing is prepared yet. `nnunet-cil run` starts it."
    lines = [f"chain {schedule.name} in {chain.folder}"]
    for variant, step, fold in _trainings(chain, variants_of(chain, methods, seeds)):
        folder = chain.model_folder(variant, step) / f"fold_{fold}"
        logs = sorted(folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
        epochs = re.findall(r"^.*?Epoch (\d+) *$", logs[-1].read_text(encoding="utf-8"), re.MULTILINE) if logs else []
        state = "waiting"
        if chain.trained(variant, step, fold):
            state = "done, data removed" if step in chain.forgotten else "done"
        elif epochs:
            state = f"epoch {int(epochs[-1]) + 1} of {block_of(chain, variant, step).training.epochs}"
        lines.append(f"  {_title(chain, variant, step, fold):60s} {state}")
    return "\n".join(lines)


@contextmanager
def _nnunet_output(chain: Chain) -> Iterator[None]:
    """Let nnU-Net find our trainers, and keep what it prints in the chain's folder instead of on the screen."""
    path = chain.folder / "logs" / "nnunet.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        nnunet_api.environment_variable("nnUNet_extTrainer", trainer_path_variable()),
        open(path, "a", encoding="utf-8") as log,
        redirect_stdout(log),
    ):
        yield


def device_of(schedule: Schedule) -> torch.device:
    """The schedule's device; ``auto`` takes CUDA where there is one, else the CPU."""
    if schedule.device != "auto":
        return torch.device(schedule.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prepared_variants(chain: Chain, methods: Sequence[str], seeds: Sequence[int | None]) -> list[Variant]:
    """The variants that are asked for, after what can be refused is refused and their data and plans are made."""
    amp_dtype(chain.schedule.training.amp, device_of(chain.schedule))
    variants = variants_of(chain, methods, seeds)
    _check_not_forgotten(chain, variants)
    needed = _with_first_steps(chain, variants)
    with _nnunet_output(chain):
        for variant in needed:
            nnunet_api.check_trainer(variant.trainer)
        prepare_chain(chain, needed)
    return variants


def _check_not_forgotten(chain: Chain, variants: Sequence[Variant]) -> None:
    """Refuse trainings whose data were removed, before anything starts."""
    lost = []
    for variant, step, fold in _trainings(chain, variants):
        gone = [other for other in chain.forgotten if other == step or _reads_earlier(chain, variant, step, other)]
        if gone and not chain.trained(variant, step, fold):
            lost.append(f"{_title(chain, variant, step, fold)}: needs the data of {', '.join(map(str, gone))}")
    if lost:
        lines = "\n  ".join(lost)
        raise ValueError(
            f"{chain.folder}: got trainings whose data were removed with `nnunet-cil audit --forget`, expected others:"
            f"\n  {lines}\nLeave these methods or seeds out, or start a chain of another name."
        )


def _reads_earlier(chain: Chain, variant: Variant, step: int | str, other: int | str) -> bool:
    """Whether a training reads data of another step: joint of all that have their own, replay of the earlier ones."""
    if step == JOINT:
        return chain.schedule.source is None
    return variant.trainer == REPLAY_TRAINER and other != JOINT and int(other) < int(step)


def _augmentation_workers(schedule: Schedule) -> str | None:
    """Value of nnUNet_n_proc_DA for a training; None leaves the choice to nnU-Net.

    On few cores the training process augments itself: worker processes and OpenMP would fight for them.
    """
    few = device_of(schedule).type == "cpu" and worker_count(64) <= FEW_CORES
    return os.environ.get(WORKERS_VARIABLE, "0" if few else None)


def _say_how(schedule: Schedule) -> None:
    device, workers = device_of(schedule), _augmentation_workers(schedule)
    dtype = amp_dtype(schedule.training.amp, device)
    where = {None: "nnU-Net's number of processes", "0": "the training process"}.get(workers, f"{workers} processes")
    precision = "full precision" if dtype is None else f"{str(dtype).removeprefix('torch.')} by autocast"
    logger.info("on %s, %s, augmentation in %s", device.type, precision, where)


def _with_first_steps(chain: Chain, variants: Sequence[Variant]) -> list[Variant]:
    first = [chain.first_step(variant.seed) for variant in variants]
    return list(dict.fromkeys([*first, *variants]))


def _trainings(chain: Chain, variants: Sequence[Variant]) -> list[tuple[Variant, int | str, int | str]]:
    """All trainings in the order of their dependencies; a step 1 that variants share stands once."""
    todo: dict[tuple[Variant, int | str, int | str], None] = {}
    for variant in variants:
        steps: list[int | str] = [JOINT] if variant.method == JOINT else [*range(1, chain.n_steps + 1)]
        for step in steps:
            owner = chain.first_step(variant.seed) if step == 1 else variant
            for fold in chain.schedule.folds:
                todo[(owner, step, fold)] = None
    return list(todo)


def _title(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> str:
    where = "all classes" if step == JOINT else f"step {step} of {chain.n_steps}"
    if step == 1 and chain.schedule.model is not None:
        return f"the given model, {where}, fold {fold}"
    return f"{variant.method}, seed {variant.seed}, {where}, fold {fold}"


def _arguments(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> list[str]:
    return nnunet_api.train_arguments(
        chain.dataset_name(step),
        chain.schedule.configuration,
        fold,
        variant.trainer,
        chain.plans_name(variant),
        device_of(chain.schedule).type,
    )


def _train(chain: Chain, variant: Variant, step: int | str, fold: int | str, label: str) -> None:
    """Run ``nnUNetv2_train`` in a process of its own, show its progress, keep its output in the chain's folder.

    Raises:
        RuntimeError: the training failed; the message ends with its last lines.
    """
    folder = chain.model_folder(variant, step) / f"fold_{fold}"
    resume = any((folder / f"checkpoint_{name}.pth").is_file() for name in ("final", "latest", "best"))
    arguments = _arguments(chain, variant, step, fold)
    logger.info("%s%s\n  %s", label, " (resumed)" if resume else "", shlex.join(["nnUNetv2_train", *arguments]))
    environment = {**os.environ, "nnUNet_extTrainer": trainer_path_variable()}
    if (workers := _augmentation_workers(chain.schedule)) is not None:
        environment[WORKERS_VARIABLE] = workers
    log_path = chain.folder / "logs" / f"{chain.plans_name(variant)}_{step}_fold_{fold}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    progress = _Progress(label, block_of(chain, variant, step).training.epochs)
    command = nnunet_api.train_process_command(arguments, resume)
    with open(log_path, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**environment, "PYTHONIOENCODING": "utf-8"},
        )
        try:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                progress.see(line)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code == 130 or code == -2:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"{label}: the training ended with code {code}.\n{_reason(log_path)}\nAll of it: {log_path}")


def _reason(log_path: Path) -> str:
    """The error in a training's output: from the last exception's line on, or the last lines."""
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()][-200:]
    starts = [i for i, line in enumerate(lines) if re.match(r"^[A-Za-z_.]*(Error|Exception|Interrupt)\b", line)]
    return "\n".join(lines[starts[-1] :][:40] if starts else lines[-15:])


class _Progress:
    """Says where a training is, at most every ten seconds: epoch, its Dice, time left."""

    def __init__(self, label: str, epochs: int) -> None:
        self.label, self.epochs = label, epochs
        self._first: tuple[int, float] | None = None
        self._shown = 0.0
        self._dice = ""

    def see(self, line: str) -> None:
        """Take a line of nnU-Net's output."""
        if match := re.search(r"Pseudo dice \[(.*)\]", line):
            values = re.findall(r"(?:np\.float\d+\()?(nan|\d+\.\d+(?:e-?\d+)?)\)?", match.group(1))
            self._dice = "  Dice on validation patches " + " ".join(f"{float(v):.2f}" for v in values)
        if "pseudo-labels: case" in line:
            self._say(line.split(": ", 1)[-1].strip())
        if match := re.search(r"Epoch (\d+) *$", line):
            epoch, now = int(match.group(1)), monotonic()
            if self._first is None:
                self._first = (epoch, now)
            done = epoch - self._first[0]
            left = ""
            if done:
                left = f", about {_duration((now - self._first[1]) / done * (self.epochs - epoch))} left"
            self._say(f"epoch {epoch + 1} of {self.epochs}{left}{self._dice}")

    def _say(self, text: str) -> None:
        if monotonic() - self._shown >= 10:
            logger.info("  %s: %s", self.label, text)
            self._shown = monotonic()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} h" if hours else f"{minutes}:{seconds:02d} min"
