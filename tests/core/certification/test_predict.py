import numpy as np
import pytest
import torch
from known_classifiers import half_space, images_at, random_images, small_network
from scipy.stats import binom, binomtest

from fedsmooth_core.certification.bounds import ABSTAIN
from fedsmooth_core.certification.predict import predict
from fedsmooth_core.errors import CertificationError

SETTING = {
    "max_value": 1,
    "sigma": 0.25,
    "n": 1000,
    "alpha": 0.001,
    "seed": 1,
    "batch_size": 1024,
    "device": "cpu",
}


def test_far_from_the_plane_it_predicts_and_on_the_plane_it_abstains():
    plane = half_space()
    images = images_at(plane, torch.tensor([-0.3, -0.1, 0.0, 0.1, 0.3]))
    labels = predict(plane, images, range(5), **SETTING)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 0, ABSTAIN, 1, 1]


def test_it_answers_wrongly_at_most_alpha_of_the_time():
    """Where the classes are almost equally likely nothing but the test keeps it from guessing.

    At p = 1/2 both answers are errors: the exact rate is that of |X - n/2| in the critical region.
    """
    plane, num, n, alpha = half_space(), 1500, 100, 0.05
    images = images_at(plane, torch.zeros(num))
    setting = SETTING | {"n": n, "alpha": alpha, "batch_size": 4096}
    labels = predict(plane, images, range(num), **setting)
    counts = np.arange(n + 1)
    answers = np.array([binomtest(int(k), n, 0.5).pvalue <= alpha for k in counts])
    exact = binom.pmf(counts, n, 0.5)[answers].sum()
    assert exact <= alpha
    standard_error = np.sqrt(exact * (1 - exact) / num)
    assert (labels != ABSTAIN).mean() == pytest.approx(exact, abs=4 * standard_error)


def test_predictions_do_not_depend_on_batch_size_or_order():
    shape = (3, 5, 5)
    model, images = small_network(shape), random_images(12, shape)
    setting = SETTING | {"max_value": 255}
    reference = predict(model, images, range(12), **setting)
    small = predict(model, images, range(12), **(setting | {"batch_size": 1}))
    np.testing.assert_array_equal(small, reference)
    order = [7, 0, 11]
    np.testing.assert_array_equal(predict(model, images[order], order, **setting), reference[order])


@pytest.mark.parametrize("changes", [{"n": 0}, {"alpha": 0.0}, {"sigma": -1.0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(CertificationError):
        predict(half_space(), torch.zeros(1, 1, 4, 4), [0], **(SETTING | changes))
