from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_cil.extraction import accumulate_prototypes, random_patch, tiles


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((10, 7, 9), (4, 7, 5)), ((4, 4, 4), (4, 4, 4)), ((5, 8, 8), (1, 4, 8)), ((17, 9, 8), (8, 8, 8))],
)
def test_tiles_cover_each_voxel_once(shape, patch):
    seen = np.zeros(shape, int)
    for where, fresh in tiles(shape, patch):
        assert seen[where].shape == patch
        seen[where][fresh] += 1
    assert (seen == 1).all()


def test_tiles_refuse_a_small_volume():
    with pytest.raises(ValueError, match="pad it first"):
        list(tiles((3, 8, 8), (4, 4, 4)))


class Pointwise(nn.Module):
    """Features that do not depend on the patch, so that a naive mean over the volume is the truth."""

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Conv3d(1, 3, 1) if dim == 3 else nn.Conv2d(1, 3, 1)
        with torch.no_grad():
            self.body.weight.copy_(scale * torch.tensor([1.0, -2.0, 0.5]).reshape(self.body.weight.shape))
            self.body.bias.zero_()

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(("dim", "patch"), [(3, (4, 8, 8)), (2, (8, 8))])
def test_prototypes_equal_a_naive_mean(dim, patch):
    rng = np.random.default_rng(0)
    cases = []
    for shape in ((6, 9, 11), (3, 8, 5)):
        labels = rng.integers(-1, 4, (1, *shape))
        cases.append((rng.normal(size=(1, *shape)).astype(np.float32), labels))
    network = Pointwise(dim).eval()
    accumulator, shift, counts = accumulate_prototypes(network, "body", 3, cases, patch, 3, torch.device("cpu"))
    store = accumulator.finish(("background", "a", "b"), 1, "", "body", None)
    values = np.concatenate([image.ravel() for image, _ in cases]).astype(np.float64)
    flat = np.concatenate([labels.ravel() for _, labels in cases])
    flat = np.where(flat < 0, 0, flat)
    for label in range(3):
        expected = values[flat == label].mean() * np.array([1.0, -2.0, 0.5])
        np.testing.assert_allclose(store.means[label], expected, rtol=1e-5, atol=1e-6)
        assert store.counts[label] == (flat == label).sum()
    assert float(shift.abs().sum()) == 0
    assert float(counts.sum()) == 0


def test_shift_is_the_mean_difference_to_the_earlier_network():
    rng = np.random.default_rng(1)
    image = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
    labels = rng.integers(0, 2, (1, 4, 4, 4))
    _, shift, counts = accumulate_prototypes(
        Pointwise(3, 3.0), "body", 3, [(image, labels)], (4, 4, 4), 2, torch.device("cpu"), earlier=Pointwise(3, 1.0)
    )
    for label in range(2):
        chosen = image[labels == label].astype(np.float64)
        np.testing.assert_allclose(
            (shift[label] / counts[label]).numpy(), 2 * chosen.mean() * np.array([1.0, -2.0, 0.5]), rtol=1e-4
        )


def test_random_patches_come_from_everywhere():
    random = np.random.default_rng(0)
    image = np.arange(12.0).reshape(1, 1, 1, 12)
    seen = {float(random_patch(image, (1, 1, 10), random)[0, 0, 0, 0, 0]) for _ in range(50)}
    assert seen == {0, 1, 2}


def test_no_voxel_at_all_is_an_error_of_the_whole_and_not_of_one_rank():
    image = np.zeros((1, 4, 4, 4), np.float32)
    for cases in ([], [(image, np.full((1, 4, 4, 4), 9))]):
        accumulator, shift, _ = accumulate_prototypes(
            Pointwise(3), "body", 3, cases, (4, 4, 4), 2, torch.device("cpu"), earlier=Pointwise(3)
        )
        assert shift.shape == (2, 3)
        with pytest.raises(ValueError, match="no voxel of any class"):
            accumulator.finish(("background", "a"), 1, "", "body", None)
