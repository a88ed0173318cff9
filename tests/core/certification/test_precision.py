from dataclasses import replace

import pytest
import torch
from known_classifiers import random_images, small_network, trained_network
from torch import nn

from fedsmooth_core.certification.precision import in_precision
from fedsmooth_core.certification.procedure import Procedure, certify_images
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.models import ModelSpec, build_model

SHAPE = (3, 5, 5)


class Seen(nn.Module):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(75, 3))
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.clone())
        return x.flatten(1) @ self.weight


def test_float32_is_the_same_function_without_tf32():
    model = trained_network(SHAPE)
    torch.backends.cudnn.allow_tf32 = True
    computing = in_precision(model, "float32")
    assert not torch.backends.cudnn.allow_tf32
    x = random_images(8, SHAPE) / 255
    torch.testing.assert_close(computing(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_it_computes_in_eval_mode_for_good_and_leaves_the_model_as_it_was():
    model = trained_network(SHAPE).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    computing = in_precision(model, "float32")
    assert not any(module.training for module in computing.train().modules())
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_bfloat16_is_a_copy_that_computes_in_it():
    model = Seen()
    computing = in_precision(model, "bfloat16")
    scores = computing(torch.full((2, *SHAPE), 0.3))
    assert scores.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in computing.parameters()} == {torch.bfloat16}
    assert computing.model.inputs[0].dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    assert not model.inputs


def test_what_is_in_bfloat16_already_stays_itself():
    computing = in_precision(small_network(SHAPE), "bfloat16")
    assert in_precision(computing, "bfloat16") is computing
    around = nn.Sequential(computing)
    assert in_precision(around, "bfloat16") is around


def test_an_unknown_precision_is_refused():
    with pytest.raises(CertificationError, match=r"float16.*float32, bfloat16"):
        in_precision(nn.Identity(), "float16")


def test_bfloat16_has_the_noise_of_float32():
    """Drawn in float32, then rounded."""
    images, labels = random_images(1, SHAPE), torch.zeros(1, dtype=torch.int64)
    inputs = []
    for precision in ("float32", "bfloat16"):
        computing = in_precision(Seen(), precision)
        procedure = Procedure(n0=1, n=100, precision=precision)
        list(
            certify_images(
                computing,
                images,
                labels,
                [0],
                max_value=255,
                procedure=procedure,
                batch_size=128,
                device="cpu",
            )
        )
        inputs.append(torch.cat([*computing.modules()][-1].inputs))
    torch.testing.assert_close(inputs[0].bfloat16(), inputs[1], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["alexnet", "resnet20"])
def test_scores_on_a_cpu_do_not_depend_on_the_pass_or_the_threads(name, precision):
    """To the last bit, from 64 images a pass up: what rows of any batch size and workers rest on."""
    spec = ModelSpec(name, "he", 10, 3, 32, 32)
    model = build_model(spec, (0.5,) * 3, (0.2,) * 3, torch.Generator().manual_seed(2))
    computing, x = in_precision(model, precision), random_images(256, (3, 32, 32)) / 255
    with torch.inference_mode():
        reference = computing(x)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for size in (64, 128, 256):
                scores = torch.cat([computing(part) for part in x.split(size)])
                torch.testing.assert_close(scores, reference, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["fixed", "sequential"])
def test_rows_in_bfloat16_do_not_depend_on_batch_size_or_company(method):
    model, images, labels = small_network(SHAPE), random_images(10, SHAPE), torch.arange(10)
    procedure = Procedure(n=1000, method=method, radius_step=0.1, precision="bfloat16")

    def rows_of(chosen, batch_size):
        rows = certify_images(
            model,
            images[chosen],
            labels[chosen],
            chosen,
            max_value=255,
            procedure=procedure,
            batch_size=batch_size,
            device="cpu",
        )
        return [replace(row, time=0.0) for row in rows]

    reference = rows_of(range(10), 512)
    assert rows_of(range(10), 128) == reference
    assert rows_of(range(10), 2048) == reference
    assert rows_of([7, 2], 512) == [reference[7], reference[2]]


@pytest.mark.parametrize(("made", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_model_that_computes_in_one_precision_is_not_taken_for_another(made, asked):
    computing = in_precision(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), made)
    assert in_precision(computing, made) is computing
    with pytest.raises(CertificationError, match=f"computes in {made} already, not in {asked}"):
        in_precision(computing, asked)
