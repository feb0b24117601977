import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div, log_softmax

from nnunet_cil.losses.distillation import (
    feature_distillation,
    fold_logits,
    folded_distillation,
    plain_distillation,
)


def logits(n_classes: int, *spatial: int, batch: int = 2, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + n_classes)
    return 3 * torch.randn(batch, n_classes, *spatial, generator=generator, dtype=dtype)


def naive(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> float:
    n_old = teacher.shape[1]
    values = []
    for b in range(student.shape[0]):
        for v in range(student[0, 0].numel()):
            if not mask[b].flatten()[v]:
                continue
            p = torch.softmax(student[b].flatten(1)[:, v], 0)
            q = torch.softmax(teacher[b].flatten(1)[:, v], 0)
            folded = [p[0] + p[n_old:].sum(), *p[1:n_old]]
            values.append(sum(float(q[k] * torch.log(q[k] / folded[k])) for k in range(n_old)))
    return sum(values) / len(values)


@pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 3, 4)])
def test_folding_adds_the_new_classes_to_the_background(spatial):
    z = logits(5, *spatial)
    p = torch.softmax(z, 1)
    expected = torch.cat([p[:, :1] + p[:, 3:].sum(1, keepdim=True), p[:, 1:3]], 1)
    torch.testing.assert_close(torch.softmax(fold_logits(z, 3), 1), expected)


def test_without_new_classes_nothing_is_folded():
    z = logits(3, 4)
    torch.testing.assert_close(fold_logits(z, 3), z)


def test_value_by_hand():
    student = torch.log(torch.tensor([0.25, 0.5, 0.25])).view(1, 3, 1)
    teacher = torch.log(torch.tensor([0.8, 0.2])).view(1, 2, 1)
    expected = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert folded_distillation(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_without_new_classes_it_is_the_kullback_leibler_divergence():
    student, teacher = logits(4, 3, 5), logits(4, 3, 5, seed=9)
    divergence = kl_div(log_softmax(student, 1), log_softmax(teacher, 1), reduction="none", log_target=True)
    torch.testing.assert_close(folded_distillation(student, teacher), divergence.sum(1).mean())


@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 2)])
def test_equals_a_loop_over_voxels(spatial):
    student, teacher = logits(5, *spatial), logits(3, *spatial)
    mask = torch.rand(2, *spatial, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1] = False
    mask[1, 0, 0] = True
    assert folded_distillation(student, teacher, mask).item() == pytest.approx(naive(student, teacher, mask), rel=1e-4)


def test_gradient_is_right_and_reaches_the_student_alone():
    student, teacher = logits(4, 3, dtype=torch.float64), logits(2, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: folded_distillation(z, teacher, mask), student)
    teacher.requires_grad_()
    folded_distillation(student, teacher, mask).backward()
    assert student.grad.abs().sum() > 0
    assert student.grad[0, :, 1].abs().sum() == 0
    assert teacher.grad is None


def test_an_empty_mask_gives_zero_with_a_graph():
    student = logits(4, 3).requires_grad_()
    loss = folded_distillation(student, logits(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ends_at_the_loss(dtype):
    student, teacher = logits(4, 3, 4).to(dtype), logits(2, 3, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = folded_distillation(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, folded_distillation(student.float(), teacher.float()))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4), st.integers(0, 3), st.integers(0, 10_000), st.floats(0.1, 30))
def test_never_negative_and_zero_where_both_agree(n_old, n_new, seed, scale):
    student = scale * logits(n_old + n_new, 7, seed=seed, dtype=torch.float64)
    teacher = scale * logits(n_old, 7, seed=seed + 1, dtype=torch.float64)
    assert folded_distillation(student, teacher) >= -1e-12
    assert folded_distillation(student, fold_logits(student, n_old)).abs() < 1e-12


def test_plain_distillation_by_hand_and_without_the_new_rows():
    teacher = torch.log(torch.tensor([[0.8, 0.2]])).reshape(1, 2, 1)
    student = torch.cat([torch.log(torch.tensor([[0.5, 0.5]])).reshape(1, 2, 1), torch.full((1, 1, 1), 9.0)], 1)
    expected = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert float(plain_distillation(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_plain_distillation_with_a_temperature_softens_both():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    softened = plain_distillation(student / 2, teacher / 2)
    torch.testing.assert_close(plain_distillation(student, teacher, 2.0), 4 * softened)


def test_plain_distillation_among_all_outputs_pushes_new_ones_down():
    teacher = torch.log(torch.tensor([[0.8, 0.2]])).reshape(1, 2, 1)
    student = torch.log(torch.tensor([[0.4, 0.1, 0.5]])).reshape(1, 3, 1).requires_grad_()
    loss = plain_distillation(student, teacher, among_all=True)
    loss.backward()
    assert float(loss) == pytest.approx(0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.1), rel=1e-5)
    torch.testing.assert_close(student.grad.flatten(), torch.tensor([0.4 - 0.8, 0.1 - 0.2, 0.5]))
    assert float(plain_distillation(student, teacher)) == pytest.approx(0, abs=1e-6), "old ones alone agree"


def test_plain_distillation_gradient():
    torch.manual_seed(0)
    student = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: plain_distillation(z, teacher.detach(), 2.0), student)
    plain_distillation(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad[:, 3:].abs().sum() == 0, "LwF knows nothing of new classes"


@pytest.mark.parametrize("loss", [plain_distillation, feature_distillation])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ends_at_the_other_losses(loss, dtype):
    student, teacher = logits(3, 3, 4).to(dtype), logits(3, 3, 4, seed=9).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(student.float(), teacher.float()))


def test_feature_distillation_is_the_mean_squared_error_with_a_gradient_for_the_student():
    student = torch.tensor([1.0, 3.0]).reshape(1, 2, 1).requires_grad_()
    teacher = torch.tensor([0.0, 1.0]).reshape(1, 2, 1).requires_grad_()
    loss = feature_distillation(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2.5)
    assert student.grad.flatten().tolist() == [1.0, 2.0]
    assert teacher.grad is None
