import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnunet_cil.extraction import transported
from nnunet_cil.prototypes import (
    PrototypeAccumulator,
    PrototypeStore,
    RunningBackground,
    choose_temperature,
    class_means,
    masked_sums,
    transported_mean,
)

K, D = 4, 3


def batch(spatial=(3, 5), size=3, seed=0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels -1 to K; the classes have unequal counts that differ between the images of the batch."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(size, D, *spatial, generator=g, dtype=dtype)
    labels = torch.randint(-1, K + 1, (size, *spatial), generator=g)
    labels[0].clamp_(max=1)
    return features, labels


def naive_sums(features, labels, n_classes=K):
    sums, counts = torch.zeros(n_classes, D, dtype=torch.float64), torch.zeros(n_classes, dtype=torch.float64)
    for b in range(len(labels)):
        for v in range(labels[b].numel()):
            c = int(labels[b].flatten()[v])
            if 0 <= c < n_classes:
                sums[c] += features[b].flatten(1)[:, v].double()
                counts[c] += 1
    return sums, counts


@pytest.mark.parametrize("spatial", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("size", [1, 3])
def test_sums_equal_a_loop_over_voxels(spatial, size):
    features, labels = batch(spatial, size)
    counts, sums = masked_sums(labels, K, features)
    expected_sums, expected_counts = naive_sums(features, labels)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts.double(), expected_counts)


def test_sums_keep_float64_and_lift_half_precision_also_under_autocast():
    features, labels = batch(dtype=torch.float64)
    assert masked_sums(labels, K, features)[1].dtype == torch.float64
    half = features.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        counts, found = masked_sums(labels, K, half)
    assert found.dtype == counts.dtype == torch.float32
    assert torch.equal(found, masked_sums(labels, K, half.float())[1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_of_two_maps_are_those_of_each_with_gradients_where_wanted(channels_last):
    student, labels = batch((3, 4, 5), dtype=torch.float64)
    teacher = torch.cat([batch((3, 4, 5), seed=1, dtype=torch.float64)[0]] * 2, 1)
    if channels_last:
        student = student.contiguous(memory_format=torch.channels_last_3d)
    counts, own, others = masked_sums(labels, K, student.requires_grad_(), teacher)
    for found, features in ((own, student), (others, teacher)):
        expected_counts, expected = masked_sums(labels, K, features)
        assert torch.equal(counts, expected_counts)
        assert torch.equal(found, expected)
    own[2].sum().backward()
    assert torch.equal(student.grad, (labels == 2).double()[:, None].expand_as(student))
    assert not others.requires_grad or teacher.grad is None


def test_gradient_of_the_sums():
    features, labels = batch((3,), 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: masked_sums(labels, K, f)[1], features.requires_grad_())


def test_average_by_hand_with_an_absent_class():
    features = torch.tensor([[[1.0, 3.0, 5.0, 9.0]], [[2.0, 4.0, 6.0, 8.0]]])
    labels = torch.tensor([[0, 0, 1, 7], [0, 2, 2, -1]])
    counts, sums = masked_sums(labels, 4, features)
    assert counts.tolist() == [3, 1, 2, 0]
    torch.testing.assert_close(class_means(sums, counts), torch.tensor([[2.0], [5.0], [5.0], [0.0]]))


def test_average_of_nothing_has_a_graph_and_no_nan():
    features, labels = batch()
    features.requires_grad_()
    counts, sums = masked_sums(torch.full_like(labels, K), K, features)
    prototypes = class_means(sums, counts)
    prototypes.sum().backward()
    assert not counts.any()
    assert torch.equal(prototypes, torch.zeros(K, D))
    assert (features.grad == 0).all()


def background_of(features, labels, background=0):
    counts, sums = masked_sums(labels, K, features)
    return sums[background], counts[background]


def test_running_background_follows_the_mean_by_the_momentum():
    features, labels = batch()
    running = RunningBackground(torch.ones(D), momentum=0.9)
    total, count = background_of(features.requires_grad_(), labels)
    running.update(total, count)
    mean = (total / count).detach()
    torch.testing.assert_close(running.prototype, 0.9 * torch.ones(D) + 0.1 * mean)
    assert not running.prototype.requires_grad


def test_running_background_of_another_label_in_half_precision():
    features, labels = batch()
    half = features.to(torch.float16)
    running = RunningBackground(torch.zeros(D), momentum=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        running.update(*background_of(half, labels, 2))
    total, count = background_of(half.float(), labels, 2)
    torch.testing.assert_close(running.prototype, total / count)


def test_a_batch_without_background_changes_nothing():
    features, labels = batch()
    running = RunningBackground(torch.full((D,), 0.3), momentum=0.9)
    running.update(*background_of(features, labels.clamp_min(1)))
    assert torch.equal(running.prototype, torch.full((D,), 0.3))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_batch_that_overflowed_changes_nothing(value):
    features, labels = batch()
    running = RunningBackground(torch.full((D,), 0.3), momentum=0.9)
    total, count = background_of(features, labels)
    running.update(total.index_fill(0, torch.tensor([1]), value), count)
    assert torch.equal(running.prototype, torch.full((D,), 0.3))
    running.update(total, count)
    assert not torch.equal(running.prototype, torch.full((D,), 0.3)), "the next one counts again"


def test_running_background_is_part_of_the_checkpoint():
    running = RunningBackground(torch.zeros(D), momentum=0.5)
    running.update(*background_of(*batch()))
    restored = RunningBackground(torch.zeros(D), momentum=0.5)
    restored.load_state_dict(running.state_dict())
    assert torch.equal(restored.prototype, running.prototype)


def accumulated(parts, samples_per_class=4096, seed=0) -> PrototypeAccumulator:
    accumulator = PrototypeAccumulator(K, D, samples_per_class, seed)
    for features, labels in parts:
        accumulator.add(features, labels)
    return accumulator


def finished(accumulator, previous=None, names=("background", "a", "b", "c")) -> PrototypeStore:
    return accumulator.finish(names, 2, "f00d", "decoder.stages.1", previous)


def test_accumulated_means_counts_and_spread_are_those_of_all_voxels():
    parts = [batch((4, 5), 2, seed) for seed in range(3)]
    store = finished(accumulated(parts))
    features = torch.cat([f for f, _ in parts]).movedim(1, -1).flatten(0, -2).double()
    labels = torch.cat([y for _, y in parts]).flatten()
    for c in range(K):
        own = features[labels == c]
        assert store.counts[c] == len(own)
        np.testing.assert_allclose(store.means[c], own.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(store.spread[c], (own - own.mean(0)).square().sum(1).mean().sqrt(), rtol=1e-5)
    np.testing.assert_allclose(store.centre, store.means.mean(0), rtol=1e-5, atol=1e-6)
    assert store.usable.all()
    assert not store.stale.any()
    assert 1e-3 <= store.tau <= 10


def test_spread_survives_a_large_common_offset():
    features, labels = batch((20, 20), 1)
    near, far = (finished(accumulated([(features.double() + offset, labels)])) for offset in (0, 1e4))
    np.testing.assert_allclose(far.spread, near.spread, rtol=1e-4)


def test_the_sample_is_bounded_seeded_and_uniform():
    def sample(seed):
        parts = [(torch.full((1, D, 500), float(i)), torch.zeros(1, 500, dtype=torch.long)) for i in range(8)]
        return accumulated(parts, samples_per_class=400, seed=seed)._samples[0][:, 0]

    assert len(sample(0)) == 400
    assert np.array_equal(sample(0), sample(0))
    assert not np.array_equal(sample(0), sample(1))
    shares = np.bincount(sample(0).astype(int), minlength=8) / 400
    assert np.abs(shares - 1 / 8).max() < 0.06


def test_a_class_without_voxels_keeps_its_old_prototype_by_name_marked_stale():
    features, labels = batch()
    previous = finished(accumulated([(features + 5, labels)]), names=("background", "b", "x", "y"))
    store = finished(accumulated([(features, torch.where(labels > 1, -1, labels))]), previous)
    assert store.stale.tolist() == [False, False, True, False]
    np.testing.assert_allclose(store.means[2], previous.means[1])
    assert store.spread[2] == previous.spread[1]
    assert np.isnan(store.means[3]).all()
    assert store.usable.tolist() == [True, True, True, False]
    assert store.counts[2:].tolist() == [0, 0]
    np.testing.assert_allclose(store.centre, store.means[:3].mean(0), rtol=1e-5)
    again = finished(accumulated([(features, torch.where(labels > 1, -1, labels))]), store)
    np.testing.assert_allclose(again.means[2], store.means[2])
    assert not again.stale[3]


def test_no_voxel_at_all_or_a_wrong_number_of_names_is_refused():
    with pytest.raises(ValueError, match="no voxel of any class"):
        finished(accumulated([]))
    with pytest.raises(ValueError, match="expected 4 names"):
        finished(accumulated([batch()]), names=("background", "a"))


def test_saved_prototypes_come_back_equal(tmp_path):
    features, labels = batch()
    store = finished(accumulated([(features, torch.where(labels > 2, -1, labels))]))
    store = replace(store, in_one_piece=("c", "a"))
    path = tmp_path / "prototypes.npz"
    path.write_bytes(b"an older file")
    store.save(path)
    loaded = PrototypeStore.load(path)
    for field in fields(PrototypeStore):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(store, field.name))
    assert loaded.class_names == store.class_names
    assert loaded.in_one_piece == ("c", "a")
    assert [p.name for p in tmp_path.iterdir()] == ["prototypes.npz"]


def test_a_file_of_a_version_that_did_not_look_at_components_names_no_class_in_one_piece(tmp_path):
    store = finished(accumulated([batch()]))
    path = tmp_path / "prototypes.npz"
    np.savez(path, **{f.name: np.asarray(getattr(store, f.name)) for f in fields(store) if f.name != "in_one_piece"})
    assert PrototypeStore.load(path).in_one_piece == ()
    store.save(path)
    assert PrototypeStore.load(path).in_one_piece == ()


@pytest.mark.faults("full disk", "the file before stays", "nothing")
def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "prototypes.npz"
    store = finished(accumulated([batch()]))
    store.save(path)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        replace(store, step=3).save(path)
    assert path.read_bytes() == before


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "prototypes.npz"
    finished(accumulated([batch()])).save(path)
    content = path.read_bytes()
    for end in [*range(0, len(content) - 1, 97), len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"prototypes\.npz: got no readable prototypes"):
            PrototypeStore.load(path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"prototypes\.npz"):
        PrototypeStore.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": np.zeros((2, D))}, r"means of shape \(2, 3\), expected \(4, 3\)"),
        ({"means": np.full((K, D), np.nan)}, "means of classes with voxels that are not finite"),
        (
            {"means": np.full((K, D), np.nan), "counts": np.zeros(K), "stale": np.ones(K, bool)},
            "means of classes with voxels that are not finite",
        ),
        ({"counts": np.zeros(3)}, "counts of shape"),
        ({"counts": np.array([-1.0, 1, 1, 1])}, "negative counts"),
        ({"spread": np.full(K, np.inf)}, "spread of classes"),
        ({"stale": np.zeros(2, bool)}, "stale of shape"),
        ({"centre": np.zeros((1, D))}, "centre of shape"),
        ({"centre": np.full(D, np.nan)}, "centre that are not finite"),
        ({"tau": 0.0}, "tau 0.0, expected a positive number"),
        ({"tau": np.nan}, "tau that are not finite"),
        ({"tau": np.zeros(2)}, "no readable prototypes"),
        ({"step": "two"}, "no readable prototypes"),
        ({"in_one_piece": ["a", "d"]}, r"unknown classes in one piece, \['d'\]"),
        ({"class_names": np.array([object()])}, "no readable prototypes.*allow_pickle"),
    ],
)
def test_inconsistent_content_is_refused(tmp_path, changes, message):
    store = finished(accumulated([batch()]))
    path = tmp_path / "prototypes.npz"
    content = {field.name: np.asarray(getattr(store, field.name)) for field in fields(store)}
    np.savez(path, **(content | changes))
    with pytest.raises(ValueError, match=rf"prototypes\.npz: got .*{message}"):
        PrototypeStore.load(path)


def test_a_missing_key_is_refused(tmp_path):
    path = tmp_path / "prototypes.npz"
    np.savez(path, means=np.zeros((K, D)))
    with pytest.raises(ValueError, match=r"KeyError.*class_names"):
        PrototypeStore.load(path)


def test_temperature_by_hand():
    means = np.array([[1.0, 0.0], [-1.0, 0.0]])
    samples = np.array([[2.0, 0.0], [-3.0, 0.0], [-1.0, 0.0]])
    # cosines are +1 and -1, so the assignment is 1 / (1 + exp(-2 / tau))
    tau = choose_temperature(samples, np.array([0, 1, 1]), means, np.zeros(2))
    assert tau == pytest.approx(2 / math.log(9), rel=1e-6)


def test_temperature_makes_the_median_assignment_the_target():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, 8))
    labels = np.repeat([0, 2], 101)
    samples = means[labels] + 0.3 * rng.normal(size=(202, 8))
    means[1] = np.nan
    centre = np.nanmean(means, 0)
    tau = choose_temperature(samples, labels, means, centre, target=0.8)
    x, p = samples - centre, (means - centre)[[0, 2]]
    cosine = (x @ p.T) / np.linalg.norm(x, axis=1, keepdims=True) / np.linalg.norm(p, axis=1)
    a = np.exp(cosine / tau) / np.exp(cosine / tau).sum(1, keepdims=True)
    assert np.median(a[np.arange(202), labels // 2]) == pytest.approx(0.8, abs=1e-4)


def test_temperature_without_enough_to_choose_from():
    means = np.array([[1.0, 0.0], [np.nan, np.nan]])
    assert choose_temperature(np.ones((4, 2)), np.zeros(4, int), means, np.zeros(2)) == 0.1
    means[1] = [-1.0, 0.0]
    assert choose_temperature(np.zeros((0, 2)), np.zeros(0, int), means, np.zeros(2)) == 0.1


def test_where_prototypes_mislead_assignments_are_about_equal():
    """The sharpest temperature would give nearly no weight to the right class, and turn distillation of it off."""
    means = np.array([[1.0, 0.0], [-1.0, 0.0]])
    wrong_side = choose_temperature(np.array([[-1.0, 0.0]]), np.array([0]), means, np.zeros(2))
    assert wrong_side == pytest.approx(10)
    right_side = choose_temperature(np.array([[1.0, 0.0]]), np.array([0]), means, np.zeros(2))
    assert 1e-3 < right_side < 10


def test_transport_takes_centre_and_temperature_of_the_new_means():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(0, 1, (1, D, 400)))
    labels = torch.from_numpy(rng.integers(0, K, (1, 400)))
    features[0, 0] += 4 * labels[0]
    accumulator = accumulated([(features, labels)])
    store, before = finished(accumulator), finished(accumulated([(features + 1, labels)]))
    moved = transported(store, before, torch.full((K, D), 30.0), torch.full((K,), 10.0), accumulator)
    assert np.abs(moved.means - store.means).max() > 1
    np.testing.assert_allclose(moved.centre, moved.means.mean(0), rtol=1e-5)
    samples, classes = features[0].T.numpy(), labels[0].numpy()
    expected = choose_temperature(samples, classes, moved.means.astype(float), moved.means.mean(0).astype(float))
    assert moved.tau == pytest.approx(expected, rel=1e-3)
    assert moved.tau != pytest.approx(store.tau, rel=1e-2)


def test_transport_moves_the_old_mean_and_merges_by_counts():
    old, shift, new = np.array([1.0, 2.0]), np.array([0.5, -1.0]), np.array([3.0, 3.0])
    np.testing.assert_allclose(transported_mean(old, 30, shift, new, 10), [(3 * 1.5 + 3) / 4, (3 * 1.0 + 3) / 4])
    nan = np.full(2, np.nan)
    np.testing.assert_allclose(transported_mean(old, 30, shift, nan, 0), old + shift)
    np.testing.assert_allclose(transported_mean(old, 0, shift, nan, 0), old + shift)
    np.testing.assert_allclose(transported_mean(nan, 0, shift, new, 10), new)


def test_transport_moves_old_organs_alone_by_their_mean_shift():
    accumulator = accumulated([batch((20, 20), 2)])
    before = finished(accumulated([batch((6, 6), seed=1)]), names=("background", "b", "a", "x"))
    store, shift, counts = finished(accumulator), torch.arange(float(K * D)).reshape(K, D), 1 + torch.arange(float(K))
    moved = transported(store, before, shift, counts, accumulator)
    for row, old in ((1, 2), (2, 1)):
        by = shift[row].numpy() / float(counts[row])
        expected = transported_mean(before.means[old], before.counts[old], by, store.means[row], store.counts[row])
        np.testing.assert_allclose(moved.means[row], expected, rtol=1e-5)
        assert moved.counts[row] == store.counts[row] + before.counts[old], "what a further step merges by"
    for row in (0, 3):
        np.testing.assert_array_equal(moved.means[row], store.means[row], err_msg="background and new classes stay")
        assert moved.counts[row] == store.counts[row]


def test_ranks_draw_samples_of_their_own(monkeypatch):
    features, labels = torch.arange(900.0).expand(1, D, 900), torch.zeros(1, 900, dtype=torch.long)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    samples = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        samples.append(set(accumulated([(features, labels)], samples_per_class=30)._samples[0][:, 0]))
    assert len(samples[0] & samples[1]) < 10, "by chance 1"


def two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features, labels = batch((4, 5), 2, seed=rank)
    labels = labels.clamp_min(1) if rank == 1 else labels
    running = RunningBackground(torch.ones(D), momentum=0.9)
    running.update(*background_of(features, labels))
    accumulator = accumulated([(features, labels)], samples_per_class=6)
    accumulator.reduce()
    finished(accumulator).save(Path(folder) / f"rank_{rank}.npz")
    sizes = [len(samples) for samples in accumulator._samples]
    torch.save((running.prototype, sizes), f"{folder}/rank_{rank}.pt")
    dist.destroy_process_group()


def test_sums_counts_and_samples_go_over_two_ranks(tmp_path):
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    first, second = (PrototypeStore.load(tmp_path / f"rank_{rank}.npz") for rank in range(2))
    for field in fields(PrototypeStore):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))

    parts = [batch((4, 5), 2, seed=rank) for rank in range(2)]
    parts[1] = (parts[1][0], parts[1][1].clamp_min(1))
    together = finished(accumulated(parts))
    np.testing.assert_allclose(first.means, together.means, rtol=1e-6)
    np.testing.assert_array_equal(first.counts, together.counts)
    np.testing.assert_allclose(first.spread, together.spread, rtol=1e-6)

    expected = RunningBackground(torch.ones(D), momentum=0.9)
    expected.update(*background_of(torch.cat([f for f, _ in parts]), torch.cat([y for _, y in parts])))
    for rank in range(2):
        prototype, sizes = torch.load(tmp_path / f"rank_{rank}.pt")
        torch.testing.assert_close(prototype, expected.prototype)
        assert sizes == [min(6, int(n)) for n in together.counts]


def test_samples_are_features_of_voxels_not_channels_mixed_over_the_batch():
    torch.manual_seed(0)
    features, labels = torch.randn(2, D, 3, 4, dtype=torch.float64), torch.randint(0, K, (2, 3, 4))
    accumulator = PrototypeAccumulator(K, D)
    accumulator.add(features, labels)
    for c in range(K):
        expected = [features[b, :, i, j].tolist() for b, i, j in (labels == c).nonzero().tolist()]
        assert sorted(accumulator._samples[c].tolist()) == sorted(expected)
