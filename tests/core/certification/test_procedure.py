from dataclasses import replace

import pytest
import torch
from known_classifiers import random_images, small_network

from fedsmooth_core.certification.certify import certify
from fedsmooth_core.certification.certify_sequential import certify_sequential
from fedsmooth_core.certification.procedure import Procedure, certify_images
from fedsmooth_core.config import from_flat, to_flat
from fedsmooth_core.errors import CertificationError, ConfigError

SHAPE = (3, 5, 5)
WHERE = {"max_value": 255, "batch_size": 512, "device": "cpu"}
NUMBERS = {"sigma": 0.2, "n0": 30, "n": 700, "alpha": 0.02, "seed": 5}


def untimed(rows):
    return [replace(row, time=0.0) for row in rows]


def test_a_procedure_is_carried_out_by_its_method():
    work = small_network(SHAPE), random_images(6, SHAPE), torch.arange(6), range(6)
    fixed = Procedure(**NUMBERS)
    assert untimed(certify_images(*work, procedure=fixed, **WHERE)) == untimed(
        certify(*work, **NUMBERS, **WHERE)
    )
    sequential = Procedure(**NUMBERS, method="sequential", radius_step=0.05)
    rows = untimed(certify_images(*work, procedure=sequential, **WHERE))
    assert rows == untimed(certify_sequential(*work, **NUMBERS, radius_step=0.05, **WHERE))
    assert all(row.n is not None for row in rows)


def test_terms_are_all_that_decides_a_row_and_no_more():
    fixed = Procedure(**NUMBERS).terms
    assert fixed == {"method": "fixed", "precision": "float32", **NUMBERS}
    assert Procedure(**NUMBERS, radius_step=0.5).terms == fixed
    sequential = Procedure(**NUMBERS, radius_step=0.5, method="sequential").terms
    assert sequential == fixed | {"method": "sequential", "radius_step": 0.5}


def test_a_procedure_travels_flat():
    procedure = Procedure(**NUMBERS, method="sequential", precision="bfloat16")
    assert from_flat(Procedure, to_flat(procedure)) == procedure


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "both"}, "method='both' is out of range: allowed is one of fixed, sequential."),
        ({"precision": "half"}, "precision='half' is out of range: allowed is one of float32, "),
        ({"sigma": 0.0}, "sigma=0.0 is out of range"),
        ({"n": 0}, "n=0 is out of range"),
        ({"alpha": 1.0}, "alpha=1.0 is out of range"),
    ],
)
def test_a_value_out_of_range_is_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        Procedure(**changes)


def test_too_fine_a_grid_is_refused_before_anything_is_drawn():
    Procedure(radius_step=1e-6)  # of no matter for fixed n
    with pytest.raises(CertificationError, match="more than 1000 radii"):
        Procedure(method="sequential", radius_step=1e-6)
