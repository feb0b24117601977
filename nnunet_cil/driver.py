"""The loop over seeds, methods and steps: train what is not trained, score what is not scored, show where it stands."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

import torch

from nnunet_cil import nnunet_api
from nnunet_cil.advice import warn_before_planning
from nnunet_cil.chain import JOINT, Chain, Variant, has_ablations, keeps_scans, method_of
from nnunet_cil.dataset import block_of, check_same_settings, prepare_chain, write_test_set
from nnunet_cil.environment import trainer_path_variable
from nnunet_cil.evaluate import (
    ENSEMBLE,
    collect_scores,
    evaluate_model,
    evaluation_file,
    is_scored,
    learned_at,
    reference_of,
    subject_scores,
    write_matrices,
)
from nnunet_cil.gather import gather_scores
from nnunet_cil.guard import Check, check_step, place_of, read_checks, stops
from nnunet_cil.launcher import Task, check_launcher, job_states, launch
from nnunet_cil.parallel import core_count, end_with_parent, in_own_process, worker_count
from nnunet_cil.precision import amp_dtype
from nnunet_cil.present import present_variants
from nnunet_cil.report import write as report_page
from nnunet_cil.report.by_test_set import by_test_set, table_by_test_set
from nnunet_cil.report.figures import plot_mean_dice
from nnunet_cil.report.paired import paired_table
from nnunet_cil.report.table import marked, score_table
from nnunet_cil.report.words import fate_of_old
from nnunet_cil.schedule import ABLATIONS, Schedule, in_effect
from nnunet_cil.step_files import write_json

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
    """The chain's own method, whole and with one part left out at a time; parts that it does not use stay.

    Raises:
        ValueError: its method has none of these parts.
    """
    own = method_of(schedule.trainer)
    if not has_ablations(schedule.trainer):
        raise ValueError(
            f"{schedule.file}: trainer: got {schedule.trainer}, expected nnUNetTrainerPGCD or one made of it: what is "
            "ablated are parts of PGCD, and this method has none of them. Use `nnunet-cil compare` for other methods."
        )
    found = {own: in_effect(schedule.method)}
    for name, changes in ABLATIONS.items():
        if (settings := in_effect({**schedule.method, **changes})) not in found.values():
            found[f"{own}-{name}"] = settings
    if same := [name for name in ABLATIONS if f"{own}-{name}" not in found]:
        logger.info("Left out, as by the schedule's settings they are another of these methods: %s.", ", ".join(same))
    return list(found)


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


def run(schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None], launcher: str | None = None) -> str:
    """Run a chain to its end from wherever it stands; returns the table.

    Interrupted at any time, the same call goes on: a training from its last checkpoint, all else from what is finished.

    Args:
        launcher: ``local`` or ``slurm`` makes a job of each training, see `launcher.launch`. Those of Slurm are not
            waited for: until all are done, where they stand is returned.
    """
    if launcher is not None:
        check_launcher(schedule, launcher)
    chain = Chain.open(schedule)
    if launcher != "slurm":
        _check_device(chain, _trainings(chain, variants_of(chain, methods, seeds)))
    with chain.locked():
        return _run(chain, methods, seeds) if launcher is None else _launch(chain, methods, seeds, launcher)


def _run(chain: Chain, methods: Sequence[str], seeds: Sequence[int | None]) -> str:
    schedule = chain.schedule
    logger.info("chain %s in %s", schedule.name, chain.folder)
    _say_how(schedule)
    variants = _prepared_variants(chain, methods, seeds)
    todo = _trainings(chain, variants)
    started, trained = monotonic(), 0
    missing = sum(not chain.trained(variant, step, fold) for variant, step, fold in todo)
    for variant, step, fold in todo:
        is_new = not chain.trained(variant, step, fold)
        label = f"[{trained + 1}/{missing}] {_title(chain, variant, step, fold)}"
        _complete(chain, variants, variant, step, fold, label)
        trained += is_new
        if is_new and trained < missing:
            left = (monotonic() - started) / trained * (missing - trained)
            logger.info("%d of %d trainings done, about %s left", trained, missing, _duration(left))
    return report(chain, variants)


def _complete(
    chain: Chain, variants: Sequence[Variant], variant: Variant, step: int | str, fold: int | str, label: str
) -> None:
    """Train a model, score it and compare it with the step before, and write the results, where that is not done.

    Raises:
        RuntimeError: the training failed, another process is at it, or the guard stops the chain here.
    """
    with chain.locked(_name(chain, variant, step, fold)):
        was_done = _is_done(chain, variant, step, fold)
        if not chain.trained(variant, step, fold):
            _train(chain, variant, step, fold, label)
        if device_of(chain.schedule).type == "cuda" and not was_done:
            # what a process has taken of a GPU it keeps until it ends, and the next training needs all of it
            check = in_own_process(judge_model, chain.schedule, variant.method, variant.seed, step, fold)
        else:
            check = _judge(chain, variant, step, fold)
    ends_here = check is not None and stops(chain, check)
    if chain.schedule.test and (ends_here or not was_done):
        report(chain, variants)
    if ends_here:
        _stop(chain, variant, check)


def judge_model(schedule: Schedule, method: str, seed: int | None, step: int | str, fold: int | str) -> Check | None:
    """Score a trained model and compare it with the step before, as a process of its own does it."""
    chain = Chain.open(schedule)
    return _judge(chain, chain.variant(method, seed), step, fold)


def _judge(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> Check | None:
    """Score a model, and after the last of several folds their ensemble; compare it with the step before."""
    device = device_of(chain.schedule)
    with _nnunet_output(chain):
        if chain.schedule.test:
            evaluate_model(chain, variant, step, fold, device)
            if _has_ensemble(chain, variant, step):
                # jobs of several folds come here at once: the others wait for the first, however long it predicts
                with chain.locked(_name(chain, variant, step, ENSEMBLE), however_long=True):
                    evaluate_model(chain, variant, step, ENSEMBLE, device)
        return check_step(chain, variant, step, fold, device)


def _has_ensemble(chain: Chain, variant: Variant, step: int | str) -> bool:
    folds = chain.schedule.folds
    return len(folds) > 1 and all(chain.trained(variant, step, fold) for fold in folds)


def _launch(chain: Chain, methods: Sequence[str], seeds: Sequence[int | None], launcher: str) -> str:
    logger.info("chain %s in %s", chain.schedule.name, chain.folder)
    variants = _prepared_variants(chain, methods, seeds, here=launcher == "local")
    trainings, checks = _trainings(chain, variants), read_checks(chain)
    for training in trainings:
        check = checks.get(place_of(chain, *training))
        if check is not None and chain.trained(*training) and stops(chain, check):
            _stop(chain, training[0], check)
    left = launch(chain, [_task(chain, *training, methods, seeds) for training in trainings], launcher)
    return status(chain.schedule, methods, seeds) if left else report(chain, variants)


def _task(
    chain: Chain,
    variant: Variant,
    step: int | str,
    fold: int | str,
    methods: Sequence[str],
    seeds: Sequence[int | None],
) -> Task:
    before = None
    if step not in (1, JOINT):
        before = _name(chain, chain.owner(variant, int(step) - 1), int(step) - 1, fold)
    work = partial(work_on, chain.schedule, variant.method, variant.seed, step, fold, tuple(methods), tuple(seeds))
    return Task(_name(chain, variant, step, fold), before, work, partial(_is_done, chain, variant, step, fold))


def work_on(
    schedule: Schedule,
    method: str,
    seed: int | None,
    step: int | str,
    fold: int | str,
    methods: Sequence[str],
    seeds: Sequence[int | None],
) -> None:
    """What one job does: complete one training of a prepared chain and write the results of all that are there.

    Args:
        schedule: as it was when the job was made; the file may have been changed since, for another chain.
        methods: of the whole run, as `seeds`.
    """
    chain = Chain.open(schedule)
    variant = chain.variant(method, seed)
    _check_device(chain, [(variant, step, fold)])
    _say_how(chain.schedule)
    _complete(chain, variants_of(chain, methods, seeds), variant, step, fold, _title(chain, variant, step, fold))


def _is_done(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> bool:
    """Whether a model is trained, and where that can be, scored and compared with the step before."""
    if not chain.trained(variant, step, fold):
        return False
    scored = [fold, *([ENSEMBLE] if _has_ensemble(chain, variant, step) else [])]
    if chain.schedule.test and not all(is_scored(chain, variant, step, each) for each in scored):
        return False
    has_before = step not in (1, JOINT) and chain.trained(variant, int(step) - 1, fold)
    return not has_before or place_of(chain, variant, step, fold) in read_checks(chain)


def _stop(chain: Chain, variant: Variant, check: Check) -> None:
    """Refuse to train on a step that has lost an organ.

    Raises:
        RuntimeError: always; it says what was lost and how the chain goes on.
    """
    before, folder = (chain.model_folder(variant, step) for step in (check.step - 1, check.step))
    lost = "; ".join(f"{name} lost ({organ})" for name, organ in check.lost(chain.schedule.guard).items())
    raise RuntimeError(
        f"{_title(chain, variant, check.step, check.fold)}: got {lost}, expected the organs of earlier steps to be "
        "kept, as `guard: on_forgetting: stop` says. No later step is trained on this model. To go on with it, set "
        f"`on_forgetting: warn`. To go on from step {check.step - 1} with other settings or data, give {before} as "
        f"`model` to a schedule of another name. To train this step anew, remove {folder / f'fold_{check.fold}'}."
    )


def report(chain: Chain, variants: Sequence[Variant]) -> str:
    """Write scores.json, the matrices, the table and the figure of what is scored so far; returns the table."""
    if not chain.schedule.test:
        return "The schedule names no test set: nothing to score."
    with chain.locked("scores"):
        return _write_results(chain, variants)


def _write_results(chain: Chain, variants: Sequence[Variant]) -> str:
    content, rows = collect_scores(chain, list(variants))
    write_json(chain.folder / "scores.json", content)
    if not rows:
        return "Nothing is scored yet."
    classes, at = list(chain.schedule.classes), learned_at(chain)
    table = score_table(rows, classes, at)
    if sets := by_test_set(content["runs"]):
        table += "\n" + table_by_test_set(rows, sets, len(classes))
    scores = subject_scores(chain, variants)
    if len(scores) > 1:
        table += "\n" + paired_table(scores, reference_of(chain, scores), classes, at)
    write_matrices(chain, content)
    (chain.folder / "table.txt").write_text(table + "\n", encoding="utf-8")
    (chain.folder / "figures").mkdir(exist_ok=True)
    plot_mean_dice(rows, at, chain.folder / "figures" / "mean_dice.png")
    return table


def write_report(
    schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None], must_be_there: bool = False
) -> Path:
    """Write ``report.html`` and all figures, without methods or seeds of all that are there; returns the page.

    Args:
        must_be_there: some of it, at least; jobs that are still queued are not.

    Raises:
        ValueError: nothing of it is there, but must be. Nothing is written then.
    """
    chain = Chain.open(schedule)
    variants, there = present_variants(chain, methods, seeds), present_variants(chain)
    if must_be_there and not chain.has_begun():
        raise ValueError(
            f"{chain.folder}: got no training that was begun and no scores, expected some to report. Start with "
            f"`nnunet-cil run {schedule.file}`."
        )
    if must_be_there and not set(variants) & set(there):
        asked, known = (", ".join(f"{v.method} with seed {v.seed}" for v in of) for of in (variants, there))
        raise ValueError(f"{chain.folder}: got nothing of {asked}, expected what was begun or scored: {known}.")
    check_same_settings(chain, variants)
    return report_page.write_report(chain, variants)


def evaluate(schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None]) -> str:
    """Score all models that are trained; returns the table. Without methods or seeds: of all that are there.

    Raises:
        ValueError: the schedule names no test set, or nothing is trained.
    """
    chain = Chain.open(schedule)
    if not schedule.test:
        raise ValueError(f"{schedule.file}: test: got nothing, expected test images and labels to score.")
    variants = present_variants(chain, methods, seeds)
    todo = [entry for entry in _trainings(chain, variants) if chain.content["plans_name"] and chain.trained(*entry)]
    if not todo:
        raise ValueError(f"{chain.folder}: got no finished training, expected one. Start with `nnunet-cil run`.")
    _check_device(chain, todo)
    check_same_settings(chain, variants)
    with chain.locked():
        write_test_set(chain)
        for variant, step, fold in todo:
            with chain.locked(_name(chain, variant, step, fold)):
                _judge(chain, variant, step, fold)
    return report(chain, variants)


def gather(schedule: Schedule, folders: Sequence[Path]) -> str:
    """Bring the scores of the same chain's runs elsewhere here; returns the table of all that is scored.

    Raises: as `gather_scores`.
    """
    chain = Chain.open(schedule)
    with chain.locked():
        logger.info("scores of %d models are new here", gather_scores(chain, folders))
    return report(chain, present_variants(chain))


def status(schedule: Schedule, methods: Sequence[str], seeds: Sequence[int | None]) -> str:
    """One line a training: waiting, at which epoch, or done, and what it did to the organs of earlier steps.

    Of a job, see `launcher`, also whether it is queued, running or failed. Without methods or seeds: of all that are
    prepared.
    """
    chain = Chain.open(schedule)
    if not chain.content["plans_name"]:
        return f"chain {schedule.name}: nothing is prepared yet. `nnunet-cil run` starts it."
    lines, checks, jobs = [f"chain {schedule.name} in {chain.folder}"], read_checks(chain), job_states(chain)
    for variant, step, fold in _trainings(chain, present_variants(chain, methods, seeds, prepared=True)):
        folder = chain.model_folder(variant, step) / f"fold_{fold}"
        logs = sorted(folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
        epochs = re.findall(r"^.*?Epoch (\d+) *$", logs[-1].read_text(encoding="utf-8"), re.MULTILINE) if logs else []
        state = jobs.get(_name(chain, variant, step, fold), "waiting")
        to_score = schedule.test and not evaluation_file(chain, variant, step, fold).is_file()
        if chain.trained(variant, step, fold) and (state == "waiting" or not to_score):
            state = "done, data removed" if step in chain.forgotten else "done"
            if check := checks.get(place_of(chain, variant, step, fold)):
                fate = fate_of_old(check.outcomes(schedule.guard))
                state += f"; {fate}" * bool(fate) + ", the guard stops here" * stops(chain, check)
        elif epochs and state in ("waiting", "running"):
            epoch = f"epoch {int(epochs[-1]) + 1} of {block_of(chain, variant, step).training.epochs}"
            state = f"running, {epoch}" if state == "running" else epoch
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


def _check_device(chain: Chain, trainings: Sequence[tuple[Variant, int | str, int | str]]) -> None:
    """Refuse a device that is not there, where something is left to do on it.

    Raises:
        ValueError: PyTorch does not see the schedule's device.
    """
    schedule = chain.schedule
    seen = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(schedule.device)
    if seen is None or seen():
        return
    if chain.content["plans_name"] is None or not all(_is_done(chain, *training) for training in trainings):
        raise ValueError(
            f"{schedule.file}: device: got {schedule.device}, but PyTorch sees none here, expected a device that it "
            "sees. Set auto or cpu, or install PyTorch for this device."
        )


def _prepared_variants(
    chain: Chain, methods: Sequence[str], seeds: Sequence[int | None], here: bool = True
) -> list[Variant]:
    """The variants that are asked for, after what can be refused is refused and their data and plans are made.

    Args:
        here: whether this machine trains them, so that its device can be judged.
    """
    if here:
        amp_dtype(chain.schedule.training.amp, device_of(chain.schedule))
    variants = variants_of(chain, methods, seeds)
    _check_not_forgotten(chain, variants)
    needed = _with_first_steps(chain, variants)
    if chain.content["plans_name"] is None:
        warn_before_planning(chain.schedule)
    with _nnunet_output(chain):
        _check_settings(chain, needed)
        prepare_chain(chain, needed)
    return variants


def _check_settings(chain: Chain, variants: Sequence[Variant]) -> None:
    """Refuse methods whose settings do not go together, all at once, as no training comes to them."""
    problems = {}
    for variant in variants:
        objective = nnunet_api.objective_of(variant.trainer)
        if objective.replays and not keeps_scans(variant.method):
            problems[variant.method] = (
                f"{variant.method}: got {variant.trainer}, which keeps scans of earlier steps, expected a name that "
                "begins with replay, so that tables and figures can say so. Name it so in `variants`."
            )
        try:
            objective.check_settings(chain.settings(variant))
        except ValueError as error:
            problems[variant.method] = f"{variant.method}: {error}"
    if problems:
        raise ValueError("\n".join(problems.values()))


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
    return keeps_scans(variant.method) and other != JOINT and int(other) < int(step)


def _augmentation_workers(schedule: Schedule) -> str | None:
    """Value of nnUNet_n_proc_DA for a training; None leaves the choice to nnU-Net.

    On few cores the training process augments itself: worker processes and OpenMP would fight for them.
    """
    few = device_of(schedule).type == "cpu" and core_count() <= FEW_CORES
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
        for step in chain.steps_of(variant):
            for fold in chain.schedule.folds:
                todo[(chain.owner(variant, step), step, fold)] = None
    return list(todo)


def _name(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> str:
    """Of a training's log, lock and job."""
    return f"{chain.plans_name(variant)}_{step}_fold_{fold}"


def _title(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> str:
    where = "all classes" if step == JOINT else f"step {step} of {chain.n_steps}"
    if step == 1 and chain.schedule.model is not None:
        return f"the given model, {where}, fold {fold}"
    return f"{marked(variant.method)}, seed {variant.seed}, {where}, fold {fold}"


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
    # by itself nnU-Net starts 8 processes for its validation, of a gigabyte each, whatever the number of cores
    environment = {
        "nnUNet_def_n_proc": str(worker_count(8)),
        **os.environ,
        "nnUNet_extTrainer": trainer_path_variable(),
    }
    if (workers := _augmentation_workers(chain.schedule)) is not None:
        environment[WORKERS_VARIABLE] = workers
    log_path = chain.folder / "logs" / f"{_name(chain, variant, step, fold)}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    block = block_of(chain, variant, step)
    progress = _Progress(label, block.training.epochs, (*block.old_classes, *block.new_classes))
    command = nnunet_api.train_process_command(arguments, resume)
    with open(log_path, "a", encoding="utf-8") as log:
        begun = log.tell()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**environment, "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        Thread(target=_clear_up, args=(process,), daemon=True).start()
        try:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                progress.see(line)
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if code == 130 or code == -2:
        raise KeyboardInterrupt
    if code:
        killed = "\nCode -9: it was killed, most often because memory ran out." if code == -signal.SIGKILL else ""
        raise RuntimeError(
            f"{label}: the training ended with code {code}.\n{_reason(log_path, begun)}\nAll of it: {log_path}{killed}"
        )


def _clear_up(training: subprocess.Popen) -> None:
    """Kill what a training leaves behind: workers of one that was killed would keep its output open for ever."""
    training.wait()
    sleep(1)
    with suppress(ProcessLookupError):
        os.killpg(training.pid, signal.SIGKILL)


def _reason(log_path: Path, begun: int) -> str:
    """The error in a training's output: from the last exception's line on, or the last lines.

    Args:
        begun: where its output begins, behind that of earlier calls.
    """
    with open(log_path, encoding="utf-8", errors="replace") as log:
        log.seek(begun)
        lines = [line for line in log.read().splitlines() if line.strip()][-200:]
    starts = [i for i, line in enumerate(lines) if re.match(r"^[A-Za-z_.]*(Error|Exception|Interrupt)\b", line)]
    return "\n".join(lines[starts[-1] :][:40] if starts else lines[-15:])


class _Progress:
    """Says where a training is, at most every ten seconds: epoch, its Dice by class, time left."""

    def __init__(self, label: str, epochs: int, classes: Sequence[str]) -> None:
        self.label, self.epochs, self.classes = label, epochs, classes
        self._first: tuple[int, float] | None = None
        self._shown = 0.0
        self._dice = ""

    def see(self, line: str) -> None:
        """Take a line of nnU-Net's output."""
        if match := re.search(r"Pseudo dice \[(.*)\]", line):
            values = re.findall(r"(?:np\.float\d+\()?(nan|\d+\.\d+(?:e-?\d+)?)\)?", match.group(1))
            seen = (f"{name} {float(v):.2f}" for name, v in zip(self.classes, values, strict=False) if v != "nan")
            self._dice = f"; Dice on validation patches: {', '.join(seen) or 'no class is there'}"
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
