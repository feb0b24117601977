from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nnunet_cil.losses.pod import local_pod, local_pod_embedding, strips, with_new_summed_into_background


def windows_of_the_paper(x: torch.Tensor, scales=(1, 2, 4)) -> torch.Tensor:
    """Eq. 5 and 6 as the paper says it, carried to 3D: per window, means along each axis; all windows, all scales."""
    embedding = []
    for s in scales:
        wx, wy, wz = (size // s for size in x.shape[2:])
        for i in range(s):
            for j in range(s):
                for k in range(s):
                    window = x[..., i * wx : (i + 1) * wx, j * wy : (j + 1) * wy, k * wz : (k + 1) * wz]
                    embedding += [window.mean(axis).flatten(1) for axis in (2, 3, 4)]
    return torch.cat(embedding, 1)


def test_equals_the_papers_windows_up_to_order():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 4, 12, dtype=torch.float64)
    ours = local_pod_embedding(x)
    naive = windows_of_the_paper(x.square())
    assert ours.shape == naive.shape
    torch.testing.assert_close(ours.sort(1).values, naive.sort(1).values)


def test_distance_equals_that_of_the_papers_windows():
    torch.manual_seed(1)
    a, b = torch.randn(2, 2, 3, 8, 8, 4, dtype=torch.float64)
    expected = [windows_of_the_paper(x.square()) for x in (a, b)]
    torch.testing.assert_close(local_pod(a, b), (expected[0] - expected[1]).norm(dim=1).mean())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_every_voxel_is_in_one_stretch_also_of_odd_sizes(parts):
    """Two published versions leave the last window out, at scale 1 all of them."""
    x = torch.zeros(1, 1, 7, 5)
    x[0, 0, 6, 4] = 1.0
    assert strips(x, 0, parts).sum() > 0
    bounds = [round(i * 7 / parts) for i in range(parts + 1)]
    sizes = torch.tensor([float(b - a) for a, b in pairwise(bounds)])
    ramp = torch.arange(7.0).reshape(1, 1, 7, 1)
    assert float((strips(ramp, 0, parts).flatten() * sizes).sum()) == 21


def test_an_axis_that_is_too_short_for_a_scale_leaves_it_out():
    x = torch.rand(1, 2, 2, 8, 8)
    assert local_pod_embedding(x).shape[1] == 2 * ((1 + 2) * 64 + 2 * (1 + 2 + 4) * 16)


def test_is_0_with_a_finite_gradient_where_both_agree():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = local_pod(x, x.detach())
    loss.backward()
    assert float(loss) == 0
    assert torch.isfinite(x.grad).all()


def test_zero_features_give_a_finite_distance():
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss = local_pod(x, torch.ones(1, 3, 4, 4))
    loss.backward()
    assert float(loss) == pytest.approx((2 * (1 + 2 + 4) * 3 * 4) ** 0.5), "one for each of the strips' voxels"
    assert torch.isfinite(x.grad).all()


def test_gradient_reaches_the_student_only_and_is_right():
    torch.manual_seed(0)
    student = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: local_pod(x, teacher.detach()), student)
    local_pod(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_half_precision_ends_at_the_loss():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = local_pod(a.bfloat16(), b.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, local_pod(a.bfloat16().float(), b.bfloat16().float()))


def test_new_logits_are_summed_into_background():
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1)
    assert with_new_summed_into_background(logits, 2).flatten().tolist() == [8.0, 2.0]


def test_the_sum_into_background_is_not_rounded_to_half_precision():
    logits = torch.tensor([1.0, 2.0, 1 / 512]).reshape(1, 3, 1)
    torch.testing.assert_close(
        with_new_summed_into_background(logits.bfloat16(), 2).float()[0, 0, 0], logits[0, ::2].sum()
    )
