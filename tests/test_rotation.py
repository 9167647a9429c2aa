"""The rotation within groups of channels, and rows of int8."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flux_quant.codecs.int8 import quantize_rows
from flux_quant.codecs.rotation import GROUPS, check_group, group_for, matrix, rotate

groups = pytest.mark.parametrize("group", GROUPS)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@groups
def test_rotation_is_the_regular_hadamard_matrix(group):
    four = np.array([[-1, 1, 1, 1], [1, -1, 1, 1], [1, 1, -1, 1], [1, 1, 1, -1]])
    expected = np.ones((1, 1))
    while len(expected) < group:
        expected = np.kron(expected, four)
    assert np.array_equal(matrix(group).numpy() * group**0.5, expected)
    assert np.array_equal(expected @ expected, group * np.eye(group))  # symmetric, orthogonal: its own inverse
    assert torch.equal(matrix(group).sum(dim=0), torch.ones(group))


@groups
def test_rotated_operands_have_the_same_product(group):
    x, w = random(5, 512), random(9, 512)
    assert relative(rotate(x, group) @ rotate(w, group).t(), x @ w.t()) < 1e-6
    assert relative(rotate(rotate(x, group), group), x) < 1e-6
    assert torch.equal(rotate(torch.full((2, 3, 256), 1.5), group), torch.full((2, 3, 256), 1.5))


def test_groups_fit_the_channels():
    assert [group_for(k) for k in (3072, 12288, 15360, 4096, 64, 320, 7)] == [256, 256, 256, 256, 64, 64, 1]
    assert group_for(3072, wish=100) == 64 and group_for(3072, wish=0) == 1 and check_group(7, 0) == 1
    for channels, group, words in ((320, 256, "use 64"), (512, 32, "0 .none., 1, 4, 16, 64, 256"), (4096, 1024, "256")):
        with pytest.raises(ValueError, match=words):
            rotate(torch.ones(1, channels), group)


def test_rows_are_rounded_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -0.5, 126.5, -3.51, 0.49]])
    codes, scale = quantize_rows(x, 1)
    assert codes.tolist() == [[127, 0, 2, -2, 0, 126, -4, 0]] and scale.item() == 1


@pytest.mark.parametrize("group", [0, 16, 256])
def test_rows_use_all_127_steps(group):
    x = random(17, 512)
    codes, scale = quantize_rows(x, group)
    y = rotate(x, group).numpy()
    largest = np.abs(y).max(axis=1, keepdims=True)
    assert np.array_equal(codes.numpy(), np.rint(y * (np.float32(127) / largest)))
    assert codes.abs().amax(dim=1).eq(127).all()
    np.testing.assert_allclose(scale.numpy(), largest / 127, rtol=1e-7)
    assert quantize_rows(x[:0], group)[1].shape == (0, 1)
