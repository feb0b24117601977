"""The methods that PGCD is compared with, each on a case with a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nnunet_cil.losses.distillation import feature_distillation, folded_distillation, plain_distillation
from nnunet_cil.losses.pod import local_pod, with_new_summed_into_background
from nnunet_cil.objectives.base import Objective, automatic_share
from nnunet_cil.objectives.ewc import EWC, diagonal_fisher
from nnunet_cil.objectives.ewf import EWF
from nnunet_cil.objectives.finetune import Finetune
from nnunet_cil.objectives.lwf import ILT, ILTOfMiB, LwF
from nnunet_cil.objectives.mib import MiB
from nnunet_cil.objectives.pgcd import PGCD
from nnunet_cil.objectives.plop import PLOP
from nnunet_cil.objectives.pseudo import Pseudo, PseudoKD
from nnunet_cil.objectives.replay import Replay
from tests.objectives.common import N_CLASSES, N_OLD, batch, settings

ALL = (Finetune, Pseudo, PseudoKD, LwF, ILT, ILTOfMiB, MiB, PLOP, EWF, EWC, Replay)
DISTILLING = {PseudoKD: {"distillation"}, LwF: {"distillation"}, ILT: {"distillation", "features"}}
DISTILLING |= {ILTOfMiB: DISTILLING[ILT], MiB: {"distillation"}, PLOP: {"pod", "pod_logits"}}
BARE_LABELS = {Finetune, LwF, ILT, ILTOfMiB, MiB, EWF, EWC}


def make(objective: type[Objective], **changes) -> Objective:
    return objective(N_OLD, N_CLASSES, settings(**changes), None)


@pytest.mark.parametrize("objective", ALL)
def test_terms_and_what_each_method_needs(objective):
    terms = make(objective)(*batch())
    assert set(terms) == DISTILLING.get(objective, set())
    assert all(torch.isfinite(term) and term >= 0 for term in terms.values())
    assert objective.uses_teacher == (objective in DISTILLING)
    assert objective.uses_pseudo_labels == (objective not in BARE_LABELS)
    assert not objective.uses_prototypes
    assert objective.replays == (objective is Replay)
    assert not make(objective, new_rows="prototypes").imprints


@pytest.mark.parametrize("objective", DISTILLING)
def test_every_term_reaches_the_student_and_none_the_teacher(objective):
    """A published port detaches the student's features in its hook, and so distils nothing."""
    student, teacher, labels = batch(requires_grad=True)
    for tensor in (teacher.logits, *teacher.features):
        tensor.requires_grad_()
    for name, term in make(objective)(student, teacher, labels).items():
        reached = torch.autograd.grad(term, [student.logits, *student.features], retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in reached), name
        kept = torch.autograd.grad(term, [teacher.logits, *teacher.features], retain_graph=True, allow_unused=True)
        assert all(g is None for g in kept), name


def test_pseudo_kd_distils_where_no_new_class_is_labelled():
    student, teacher, labels = batch()
    kept = (labels < N_OLD) | (labels >= N_CLASSES)
    expected = 2 * folded_distillation(student.logits, teacher.logits, kept)
    torch.testing.assert_close(make(PseudoKD, lambda_kd=2.0)(student, teacher, labels)["distillation"], expected)


def test_lwf_and_ilt_have_their_sources_terms():
    student, teacher, labels = batch()
    lwf = make(LwF, lambda_lwf=3.0, lwf_temperature=5.0)(student, teacher, labels)
    torch.testing.assert_close(lwf["distillation"], 3 * plain_distillation(student.logits, teacher.logits, 5.0))
    ilt = make(ILT, lambda_lwf=3.0, lambda_ilt=0.5)(student, teacher, labels)
    torch.testing.assert_close(
        ilt["distillation"], 3 * plain_distillation(student.logits, teacher.logits, among_all=True)
    )
    expected = 0.5 * feature_distillation(student.features[0], teacher.features[0])
    torch.testing.assert_close(ilt["features"], expected)
    of_mib = make(ILTOfMiB, lambda_lwf=3.0, lambda_ilt=0.5)(student, teacher, labels)
    torch.testing.assert_close(of_mib["distillation"], 3 * plain_distillation(student.logits, teacher.logits))
    torch.testing.assert_close(of_mib["features"], expected)


def test_mib_segmentation_folds_old_classes_into_background():
    output = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])).reshape(1, 5, 1, 1).expand(1, 5, 1, 6)
    target = torch.tensor([0, 1, 2, 3, 4, 5]).reshape(1, 1, 1, 6).to(torch.int16)
    folded, shifted = make(MiB).segmentation(output, target)
    expected = torch.tensor([0.6, 0.15, 0.25])
    torch.testing.assert_close(torch.softmax(folded, 1)[0, :, 0, 0], expected)
    assert shifted.flatten().tolist() == [0, 0, 0, 1, 2, 5], "the ignore id stays"
    assert shifted.dtype == target.dtype


def test_mib_segmentation_neither_rewards_nor_punishes_old_against_background():
    output = torch.randn(1, N_CLASSES, 2, 2, requires_grad=True)
    folded, shifted = make(MiB).segmentation(output, torch.zeros(1, 1, 2, 2).long())
    nn.functional.cross_entropy(folded, shifted[:, 0]).backward()
    within = output.grad[:, :N_OLD] / torch.softmax(output[:, :N_OLD], 1)
    torch.testing.assert_close(within, within[:, :1].expand_as(within))


def test_only_mib_changes_what_the_loss_sees_and_only_plop_scales_it():
    changed = {objective for objective in (*ALL, PGCD) if objective.segmentation is not Objective.segmentation}
    scaled = {o for o in (*ALL, PGCD) if o.segmentation_weight is not Objective.segmentation_weight}
    assert (changed, scaled) == ({MiB}, {PLOP})


def test_mib_distils_everywhere():
    student, teacher, labels = batch()
    expected = 3 * folded_distillation(student.logits, teacher.logits)
    torch.testing.assert_close(make(MiB, lambda_kd=3.0)(student, teacher, labels)["distillation"], expected)


def test_plop_is_the_mean_over_layers_scaled_by_classes():
    """A published version takes the mean inside of the loop, and so divides early layers many times."""
    batches = [batch(seed) for seed in range(3)]
    student, teacher, labels = batches[0]
    student = student._replace(features=sum((s.features for s, _, _ in batches), ()))
    teacher = teacher._replace(features=sum((t.features for _, t, _ in batches), ()))
    layers = [local_pod(s, t) for s, t in zip(student.features, teacher.features, strict=True)]
    scale = math.sqrt(N_CLASSES / (N_CLASSES - N_OLD))
    terms = make(PLOP, lambda_pod=0.5)(student, teacher, labels)
    torch.testing.assert_close(terms["pod"], 0.5 * scale * (layers[0] + layers[1] + layers[2]) / 3)
    terms = make(PLOP, lambda_pod_logits=0.3)(student, teacher, labels)
    logits = with_new_summed_into_background(student.logits, N_OLD)
    torch.testing.assert_close(terms["pod_logits"], 0.3 * scale * local_pod(logits, teacher.logits))


def test_plop_without_pod_is_its_pseudo_labels():
    plop = make(PLOP, lambda_pod=0.0, lambda_pod_logits=0.0)
    student, teacher, labels = batch()
    assert plop(student, teacher, labels) == {}
    output, target = torch.randn(1, 5, 2), torch.zeros(1, 1, 2)
    assert all(a is b for a, b in zip(plop.segmentation(output, target), (output, target), strict=True))


def test_plop_adaptive_factor_is_the_accepted_share_of_what_is_not_new():
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 5, 5, 5])  # three accepted, three new, three undecided
    assert float(make(PLOP).segmentation_weight(labels)) == pytest.approx(0.5)
    assert float(make(PLOP).segmentation_weight(torch.full((4,), 3))) == 0


def test_plop_taps_every_stage():
    network = nn.Module()
    network.encoder, network.decoder = nn.Module(), nn.Module()
    network.encoder.stages = nn.ModuleList(nn.Identity() for _ in range(3))
    network.decoder.stages = nn.ModuleList(nn.Identity() for _ in range(2))
    network.decoder.seg_layers = nn.ModuleList()
    names = [f"encoder.stages.{i}" for i in range(3)] + [f"decoder.stages.{i}" for i in range(2)]
    assert PLOP.feature_paths(network) == tuple(names)
    assert ILT.feature_paths(network) == ("encoder.stages.2",)
    assert Pseudo.feature_paths(network) == ("decoder.stages.1",)


def test_automatic_fusion_share_by_hand():
    assert automatic_share(n_old=4, n_classes=5) == pytest.approx(1 - math.sqrt(1 / 4))


@pytest.mark.parametrize(
    ("objective", "fusion", "share"),
    [
        (EWF, None, automatic_share(N_OLD, N_CLASSES)),
        (EWF, 0.0, 0.0),
        (EWF, 0.3, 0.3),
        (PseudoKD, None, 0.0),
        (PseudoKD, "auto", automatic_share(N_OLD, N_CLASSES)),
        (PseudoKD, 1, 1.0),
    ],
)
def test_fusion_share(objective, fusion, share):
    assert make(objective, fusion=fusion).fusion_share() == pytest.approx(share)


def small_network(n_out: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 1), nn.LeakyReLU(), nn.Conv1d(2, n_out, 1))


def patches():
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(1, 1, 6, generator=generator)


def test_fisher_of_a_softmax_layer_equals_its_expectation():
    """One voxel, one bias a class: the Fisher information of b_k is p_k (1 - p_k)."""
    network = nn.Conv1d(1, 3, 1)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.log(torch.tensor([0.2, 0.3, 0.5])))
    one_voxel = iter(torch.ones(4000, 1, 1, 1))
    fisher = diagonal_fisher(network, one_voxel, 4000, torch.Generator().manual_seed(0))
    expected = torch.tensor([0.2 * 0.8, 0.3 * 0.7, 0.5 * 0.5])
    torch.testing.assert_close(fisher["bias"], expected / 0.25, atol=0.05, rtol=0)
    assert network.bias.grad is None


def test_fisher_does_not_touch_the_networks_or_the_global_generators_state():
    network = small_network(3).requires_grad_(False)
    before = torch.get_rng_state()
    diagonal_fisher(network, patches(), 3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_ewc_is_0_at_the_start_and_the_weighted_square_after():
    teacher, student = small_network(N_OLD), small_network(N_CLASSES)
    anchor = {name: value.clone() for name, value in student.state_dict().items()}
    ewc = make(EWC, lambda_ewc=4.0, ewc_patches=5)
    ewc.start(teacher, anchor, patches())
    assert float(ewc.parameter_terms(student)["ewc"]) == 0
    fisher = diagonal_fisher(teacher, patches(), 5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        student[2].bias += 2.0
    torch.testing.assert_close(ewc.parameter_terms(student)["ewc"], 4 * 4 * fisher["2.bias"].sum())
    term = ewc.parameter_terms(student)["ewc"]
    (gradient,) = torch.autograd.grad(term, [student[2].bias])
    assert (gradient[:N_OLD] > 0).all()
    assert (gradient[N_OLD:] == 0).all(), "rows of new classes are free"


def test_ewc_of_weight_0_is_finetuning():
    ewc = make(EWC, lambda_ewc=0.0)
    ewc.start(small_network(N_OLD), {}, patches())
    assert ewc.parameter_terms(small_network(N_CLASSES)) == {}


def test_ewc_follows_its_device_and_leaves_no_trace_in_the_checkpoint():
    ewc = make(EWC, ewc_patches=1)
    ewc.start(small_network(N_OLD), small_network(N_CLASSES).state_dict(), patches())
    assert len(list(ewc.buffers())) == 8
    assert ewc.state_dict() == {}
