"""Every way to compute a convolution against PyTorch's, client by client, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import generator
from torch import nn

from fedsmooth_core.cohort.convolution import (
    ConvShape,
    Dense,
    Direct,
    SpaceToDepth,
    Unfolded,
    candidates,
    for_one_client,
)
from fedsmooth_core.config import AttackConfig

WAYS = {
    "direct": Direct,
    "dense": Dense,
    "unfolded": Unfolded,
    "space-to-depth, direct": lambda shape: SpaceToDepth(shape, Direct),
    "space-to-depth, unfolded": lambda shape: SpaceToDepth(shape, Unfolded),
}

shapes = st.builds(
    ConvShape,
    in_channels=st.integers(1, 3),
    out_channels=st.integers(1, 4),
    kernel=st.integers(1, 6),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", WAYS)
@settings(deadline=None, max_examples=60)
@given(shape=shapes, num_clients=st.integers(1, 3), size=st.integers(1, 3), has_bias=st.booleans())
def test_each_way_is_the_convolution_and_its_gradients(name, shape, num_clients, size, has_bias):
    assume(shape.out_height >= 1 and shape.out_width >= 1)
    assume(name != "unfolded" or shape.stride == 1)
    kernel = shape.kernel
    weight = numbers(num_clients, shape.out_channels, shape.in_channels, kernel, kernel, seed=1)
    bias = numbers(num_clients, shape.out_channels, seed=2) if has_bias else None
    x = numbers(num_clients, size, shape.in_channels, shape.height, shape.width)
    way = WAYS[name](shape)

    kept = way.pack(weight).contiguous()
    assert torch.equal(way.unpack(kept), weight)
    leaves = [x.clone().requires_grad_(), kept.requires_grad_()]
    leaves += [] if bias is None else [bias.clone().requires_grad_()]
    prepared = way.prepare(leaves[1], leaves[2] if has_bias else None, torch.float64)
    out = way.apply(leaves[0], *prepared)

    plain = [tensor.clone().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    expected = torch.stack(
        [
            F.conv2d(
                plain[0][client],
                plain[1][client],
                plain[2][client] if has_bias else None,
                shape.stride,
                shape.padding,
            )
            for client in range(num_clients)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    direction = numbers(*expected.shape, seed=3)
    gradients = list(torch.autograd.grad(out, leaves, direction))
    gradients[1] = way.unpack(gradients[1])
    torch.testing.assert_close(
        gradients, list(torch.autograd.grad(expected, plain, direction)), rtol=0, atol=1e-11
    )


@settings(deadline=None)
@given(shapes)
def test_what_is_chosen_and_what_is_offered_fits_the_shape(shape):
    assume(shape.out_height >= 1 and shape.out_width >= 1)
    for way in (for_one_client(AttackConfig())(shape), *candidates(shape)):
        weight = numbers(2, shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
        x = numbers(2, 1, shape.in_channels, shape.height, shape.width)
        prepared, _ = way.prepare(way.pack(weight), None, torch.float64)
        assert way.apply(x, prepared, None).shape[-2:] == (shape.out_height, shape.out_width)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (AttackConfig(), [SpaceToDepth, Direct, Dense]),
        (AttackConfig(estimator="one_point"), [Direct, Direct, Dense]),
        (AttackConfig(attack_steps=0), [Direct, Direct, Direct]),
    ],
    ids=["stochastic", "one-point", "no attack"],
)
def test_the_convolutions_of_alexnet_are_rearranged_as_the_attack_makes_it_worth(attack, expected):
    shapes_of_alexnet = [
        ConvShape(3, 64, 11, 4, 5, 32, 32),
        ConvShape(64, 192, 5, 1, 2, 4, 4),
        ConvShape(256, 256, 3, 1, 1, 2, 2),
    ]
    assert [type(for_one_client(attack)(shape)) for shape in shapes_of_alexnet] == expected


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, (3, 1)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    ],
)
def test_other_convolutions_have_no_shape(layer):
    assert ConvShape.of(layer, 8, 8) is None


def test_bfloat16_computes_in_it_and_keeps_float32_weights():
    shape = ConvShape(3, 8, 3, 1, 1, 2, 2)
    weight = torch.randn(2, 8, 3, 3, 3, generator=generator())
    for way in (Direct(shape), Dense(shape), Unfolded(shape)):
        kept = way.pack(weight).contiguous().requires_grad_()
        prepared, _ = way.prepare(kept, None, torch.bfloat16)
        out = way.apply(torch.ones(2, 4, 3, 2, 2, dtype=torch.bfloat16), prepared, None)
        assert out.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(out.sum(), kept)
        assert gradient.dtype == torch.float32
