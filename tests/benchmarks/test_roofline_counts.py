"""What the roofline counts is what PyTorch's own counter counts while a local step runs."""

import pytest
import torch
import workload
from roofline import Counts, Layers
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
ALEXNET_WEIGHTS = 2_472_266


@pytest.fixture(scope="module")
def layers():
    dataset = workload.random_images(1)
    spec = workload.model_spec(workload.paper_plan(), dataset)
    model = workload.new_model(spec, dataset.info, CPU)
    return Layers.of(model, torch.zeros(1, *workload.SHAPE))


@pytest.mark.parametrize("estimator", ["stochastic", "one_point"])
@pytest.mark.parametrize("attack_steps", [0, 1, 3])
def test_operations_of_a_local_step(layers, attack_steps, estimator):
    plan = workload.paper_plan(attack_steps, estimator, local_steps=1, batch_size=4)
    cohort = workload.Cohort.of(plan, 1, CPU)
    with FlopCounterMode(display=False) as counter:
        cohort.plain_loop()
    # The one-point estimator's sum over noise vectors is counted as a product, too: a ten-thousandth.
    assert layers.local_step(plan).operations == pytest.approx(
        counter.get_total_flops(), rel=2e-3 if estimator == "one_point" else 0
    )


def test_operations_of_a_certificate(layers):
    dataset = workload.random_images(3)
    model = workload.new_model(
        workload.model_spec(workload.paper_plan(), dataset), dataset.info, CPU
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(3, *workload.SHAPE))
    assert layers.certificate(draws=3, batch_size=2).operations == counter.get_total_flops()


def test_bytes_in_closed_form(layers):
    plan = workload.paper_plan(attack_steps=2)
    weights = 4 * ALEXNET_WEIGHTS
    # Read in 2 * 2 + 2 passes; gradients written; SGD reads three of their size and writes two.
    assert layers.local_step(plan).bytes == (6 + 1 + 5) * weights
    image = 4 * 3 * 32 * 32
    assert layers.certificate(draws=10, batch_size=4).bytes == 2 * 10 * image + 3 * weights


def test_the_floor_is_the_longer_of_the_two_times():
    counts = Counts(operations=100.0, bytes=30.0)
    assert counts.floor(10.0, 1.0) == 30.0
    assert counts.floor(2.0, 1.0) == 50.0
