"""The training benchmarks train what the paper trains, and compare weights as they say."""

import numpy as np
import pytest
import torch
import workload
from paper_run import paper_config
from training import difference

from server.configuration import compose


def test_the_plan_is_that_of_the_papers_figures():
    figure = compose(["experiment=fig1", "partition.gamma=0.1"])
    mine = workload.paper_plan()
    assert mine.model == figure.model
    assert mine.smoothing == figure.smoothing
    assert mine.attack == figure.attack
    assert mine.training == figure.training
    whole = paper_config()
    assert whole.plan.training == figure.training
    assert whole.partition == figure.partition
    assert whole.federation.num_rounds == figure.federation.num_rounds
    assert whole.cohort_size == figure.cohort_size == 100
    assert whole.evaluation.every == figure.evaluation.every


def test_images_are_the_same_every_time_and_differ_between_splits():
    first, again, test = (
        workload.random_images(20, split).images for split in ("train", "train", "test")
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, test)


def test_a_difference_is_a_share_of_the_updates_length():
    start = {"w": torch.zeros(3), "b": torch.zeros(1)}
    plain = [{"w": torch.tensor([3.0, 0.0, 0.0]), "b": torch.tensor([4.0])}] * 2
    moved = {"w": torch.tensor([3.0, 1.0, 0.0]), "b": torch.tensor([4.0])}
    assert difference(plain, plain, start) == 0
    assert difference([plain[0], moved], plain, start) == pytest.approx(1 / 5)
