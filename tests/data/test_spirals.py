import math

import pytest
import torch

from growkernels.experiments.images.spirals import spirals, split


def test_points_follow_the_formula():
    points, labels = spirals(per_class=300, inner_radius=0.5, circles=1.0, dtype=torch.float64)
    assert points.shape == (600, 2)
    assert labels.tolist() == [0] * 300 + [1] * 300
    for sign, offset in ((-1, 0), (1, 300)):
        for i in (0, 1, 77, 299):
            angle, radius = 2 * math.pi * i / 300, 0.5 + i / 300
            expected = (sign * radius * math.cos(angle), sign * radius * math.sin(angle))
            assert points[offset + i].tolist() == pytest.approx(expected, abs=1e-12)


def test_spirals_are_point_symmetric_and_within_their_radii():
    points, _ = spirals()
    torch.testing.assert_close(points[:300], -points[300:])
    radii = points.norm(dim=1)
    assert radii.min().item() == pytest.approx(0.5)
    assert radii.max().item() == pytest.approx(1.5 - 1 / 300, rel=1e-5)


def test_split_is_a_partition_fixed_by_the_seed():
    points, labels = spirals()
    first = split(points, labels, torch.Generator().manual_seed(1))
    again = split(points, labels, torch.Generator().manual_seed(1))
    other = split(points, labels, torch.Generator().manual_seed(2))
    assert first.train_points.shape == (450, 2)
    assert first.test_points.shape == (150, 2)
    assert torch.equal(first.train_points, again.train_points)
    assert not torch.equal(first.train_points, other.train_points)
    together = torch.cat((first.train_points, first.test_points))
    assert {tuple(p) for p in together.tolist()} == {tuple(p) for p in points.tolist()}
    for point, label in zip(first.test_points[:20], first.test_labels[:20], strict=True):
        row = (points == point).all(dim=1).nonzero()[0, 0]
        assert labels[row] == label


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="at least one point"):
        spirals(per_class=0)
    points, labels = spirals(per_class=2)
    with pytest.raises(ValueError, match="empty part"):
        split(points, labels, torch.Generator(), train_fraction=1.0)
