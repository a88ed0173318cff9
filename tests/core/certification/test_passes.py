import logging

import numpy as np
import pytest
import torch
from known_classifiers import random_images, small_network, trained_network
from torch import nn

from fedsmooth_core.certification import compiling
from fedsmooth_core.certification.compiling import compiled_if_faster
from fedsmooth_core.certification.passes import NOISE_BLOCK, Block, Passes, StoppedError
from fedsmooth_core.certification.precision import in_precision
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.models import ModelSpec, build_model

SHAPE = (3, 5, 5)


def passes_of(model, batch_size, shape=SHAPE, device="cpu", **options):
    return Passes(
        model, torch.Size(shape), sigma=0.5, device=device, batch_size=batch_size, **options
    )


def blocks_of(device="cpu"):
    """Five blocks of two streams, the last of which counts three draws."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in (1, 2)]
    counted = [NOISE_BLOCK] * 4 + [3]
    return (Block(i // 3, generators[i // 3], i // 3, counted[i]) for i in range(5))


def counts_of(passes, device="cpu"):
    x = random_images(2, SHAPE).to(device) / 255
    return passes.count(x, blocks_of(device), 2, [0, 1])


def test_blocks_are_taken_pass_by_pass():
    """A plan of 10^9 draws must not be laid out before the first of them."""
    model, seen, drawn = small_network(SHAPE), [], []
    model.register_forward_hook(lambda _, x, __: seen.append((len(x[0]), len(drawn))))

    def noted():
        for block in blocks_of():
            drawn.append(block)
            yield block

    passes = passes_of(model, 2 * NOISE_BLOCK)
    counts = passes.count(random_images(2, SHAPE) / 255, noted(), 2, [0, 1])
    assert seen == [(2 * NOISE_BLOCK, 2), (2 * NOISE_BLOCK, 4), (2 * NOISE_BLOCK, 5)]
    np.testing.assert_array_equal(counts.sum(1), [3 * NOISE_BLOCK, NOISE_BLOCK + 3])


def test_passes_may_be_used_again():
    passes = passes_of(small_network(SHAPE), 256)
    first = counts_of(passes)
    np.testing.assert_array_equal(counts_of(passes), first)
    np.testing.assert_array_equal(counts_of(passes_of(small_network(SHAPE), 1024)), first)


@pytest.mark.parametrize(
    ("name", "precision", "blocks"),
    [
        ("alexnet", "float32", 2),  # 16 KiB an image at the first convolution
        ("alexnet", "bfloat16", 2),  # 12 KiB, the image itself in float32
        ("resnet20", "float32", 1),  # 64 KiB
        ("resnet110", "bfloat16", 1),
    ],
)
def test_without_a_batch_size_the_largest_output_stays_within_its_bound(name, precision, blocks):
    spec = ModelSpec(name, "he", 10, 3, 32, 32)
    model = build_model(spec, (0.5,) * 3, (0.2,) * 3, torch.Generator().manual_seed(2))
    assert passes_of(in_precision(model, precision), None, (3, 32, 32)).num_blocks == blocks


def test_small_networks_have_passes_of_a_thousand_images():
    assert passes_of(small_network((1, 2, 2)), None, (1, 2, 2)).num_blocks == 8


def test_stopped_passes_end_before_the_next():
    passes = passes_of(small_network(SHAPE), 128)
    passes.stop.set()
    with pytest.raises(StoppedError):
        counts_of(passes)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(CertificationError, match="batch_size=0"):
        passes_of(small_network(SHAPE), 0)


class Compiled(nn.Module):
    """What torch.compile returns here: the model, after some work more or less."""

    def __init__(self, model, extra):
        super().__init__()
        self.model = model
        self.extra = extra

    def forward(self, x):
        for _ in range(self.extra):
            self.model(x)
        return self.model(x)


def test_compilation_that_does_not_gain_is_left_out_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda model, **_: Compiled(model, 5))
    model, batch = small_network(SHAPE).eval(), torch.rand((512, *SHAPE))
    with caplog.at_level(logging.INFO):
        assert compiled_if_faster(model, batch) is model
    assert "does not gain here" in caplog.text


def test_compilation_that_gains_is_used(monkeypatch, caplog):
    slow = Compiled(small_network(SHAPE), 5)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model.model)
    with caplog.at_level(logging.INFO):
        assert compiled_if_faster(slow, torch.rand((512, *SHAPE))) is slow.model
    assert "it is used" in caplog.text


def test_compilation_that_fails_is_said_in_one_sentence(monkeypatch, caplog):
    class NoCompiler(nn.Module):
        def forward(self, x):
            raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda model, **_: NoCompiler())
    passes = passes_of(small_network(SHAPE), 256, compile=True)
    with caplog.at_level(logging.INFO, logger=compiling.__name__):
        counts = counts_of(passes)
    assert "fails here" in caplog.text
    assert "long trace" not in caplog.text
    np.testing.assert_array_equal(counts, counts_of(passes_of(small_network(SHAPE), 256)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cuda_graph_counts_what_single_operations_count(precision, monkeypatch):
    model = trained_network(SHAPE).cuda()
    captured = passes_of(in_precision(model, precision), 256, device="cuda")
    counts = counts_of(captured, "cuda")
    assert captured._graph is not None
    np.testing.assert_array_equal(counts_of(captured, "cuda"), counts)
    monkeypatch.setattr(Passes, "_capture", lambda _: None)
    single = passes_of(in_precision(model, precision), 256, device="cuda")
    np.testing.assert_array_equal(counts_of(single, "cuda"), counts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_no_graph_can_hold_runs_without():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(75, 3)

        def forward(self, x):
            return self.linear(x.flatten(1)) + float(x.sum() * 0)

    passes = passes_of(in_precision(Asking().cuda(), "float32"), 256, device="cuda")
    counts = counts_of(passes, "cuda")
    assert passes._graph is None
    np.testing.assert_array_equal(counts.sum(1), [3 * NOISE_BLOCK, NOISE_BLOCK + 3])


class Squeezing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x.mean((2, 3)).squeeze()).log_softmax(1)


def test_a_model_that_squeezes_a_single_image_still_has_a_pass_size():
    passes = Passes(
        Squeezing().eval(),
        torch.Size((3, 4, 4)),
        sigma=0.5,
        device=torch.device("cpu"),
        batch_size=None,
    )
    assert passes.num_blocks >= 1
