import numpy as np
import pytest
import torch
from known_classifiers import random_images, small_network
from torch import nn

from fedsmooth_core.certification.counting import count_predictions
from fedsmooth_core.certification.passes import NOISE_BLOCK
from fedsmooth_core.errors import CertificationError
from fedsmooth_core.models import Normalise
from fedsmooth_core.seeding import Purpose, torch_generator

SHAPE = (3, 5, 5)  # 75 values an image: no multiple of the 16 that PyTorch draws at a time


class Recorder(nn.Module):
    """Keeps what it is given, and predicts class 0."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.clone())
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


def counts_of(model, images, indices, streams, *, batch_size=512, sigma=0.5, seed=4, max_value=255):
    groups = count_predictions(
        model,
        images,
        indices,
        streams,
        max_value=max_value,
        sigma=sigma,
        seed=seed,
        batch_size=batch_size,
        device="cpu",
    )
    return np.concatenate([counts for _, counts in groups])


def test_every_draw_is_counted_once():
    streams = [(Purpose.SELECTION, 100), (Purpose.ESTIMATION, 3 * NOISE_BLOCK + 1)]
    model = small_network(SHAPE)
    counts = counts_of(model, random_images(5, SHAPE), range(5), streams)
    assert counts.shape == (5, 2, 10)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts.sum(axis=2), [[100, 3 * NOISE_BLOCK + 1]] * 5)


@pytest.mark.parametrize("batch_size", [1, 50, 128, 300, 1024, 5000])
def test_counts_do_not_depend_on_the_batch_size(batch_size):
    streams = [(Purpose.SELECTION, 30), (Purpose.ESTIMATION, 700)]
    model = small_network(SHAPE)
    images = random_images(7, SHAPE)
    reference = counts_of(model, images, range(7), streams)
    other = counts_of(model, images, range(7), streams, batch_size=batch_size)
    np.testing.assert_array_equal(other, reference)
    assert len(np.unique(reference[:, 1].argmax(axis=1))) > 1  # no trivial classifier


def test_counts_do_not_depend_on_order_or_company():
    streams = [(Purpose.SELECTION, 30), (Purpose.ESTIMATION, 300)]
    model = small_network(SHAPE)
    images = random_images(9, SHAPE)
    together = counts_of(model, images, range(9), streams)
    order = [8, 2, 5, 0]
    shuffled = counts_of(model, images[order], order, streams)
    np.testing.assert_array_equal(shuffled, together[order])
    alone = counts_of(model, images[5:6], [5], streams)
    np.testing.assert_array_equal(alone[0], together[5])


def test_more_draws_begin_with_the_same_draws():
    """Counts of n draws are those of the first n of a longer stream."""
    model, images = Recorder(), random_images(1, SHAPE)
    counts_of(model, images, [3], [(Purpose.ESTIMATION, 200)], batch_size=NOISE_BLOCK)
    short = torch.cat(model.inputs)
    model.inputs.clear()
    counts_of(model, images, [3], [(Purpose.ESTIMATION, 500)], batch_size=2 * NOISE_BLOCK)
    torch.testing.assert_close(torch.cat(model.inputs)[:200], short[:200], rtol=0, atol=0)


def noise_seen(images, index, purpose, **kwargs):
    model = Recorder()
    counts_of(model, images, [index], [(purpose, 256)], batch_size=256, **kwargs)
    return torch.cat(model.inputs) - images.float() / 255


def test_each_image_and_each_purpose_has_noise_of_its_own():
    image = random_images(1, SHAPE)
    seen = [
        noise_seen(image, 0, Purpose.SELECTION),
        noise_seen(image, 0, Purpose.ESTIMATION),
        noise_seen(image, 0, Purpose.PREDICTION),
        noise_seen(image, 1, Purpose.ESTIMATION),
        noise_seen(image, 0, Purpose.ESTIMATION, seed=5),
    ]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
            assert abs(correlation) < 0.05  # 19,200 values: standard error 0.007


def test_noise_is_that_of_the_named_stream_with_sigma_and_is_never_clipped():
    images = torch.zeros((1, *SHAPE), dtype=torch.uint8)
    images[:, 1] = 255
    noise = noise_seen(images, 17, Purpose.ESTIMATION)
    generator = torch_generator(4, Purpose.ESTIMATION, 17)
    block = torch.empty((NOISE_BLOCK, *SHAPE)).normal_(0.0, 0.5, generator=generator)
    torch.testing.assert_close(noise[:NOISE_BLOCK], block, rtol=0, atol=1e-6)
    assert noise.std() == pytest.approx(0.5, rel=0.02)
    # On black and on white pixels alike, half of the noise leads out of [0, 1].
    assert (noise[:, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert (noise[:, 1] > 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_noise_is_added_before_the_models_normalisation():
    recorder = Recorder()
    model = nn.Sequential(Normalise([0.5] * 3, [0.1, 0.2, 0.4]), recorder)
    images = torch.full((1, *SHAPE), 128, dtype=torch.uint8)
    counts_of(model, images, [0], [(Purpose.ESTIMATION, 1024)])
    spread = torch.cat(recorder.inputs).std(dim=(0, 2, 3))
    torch.testing.assert_close(spread, torch.tensor([5.0, 2.5, 1.25]), rtol=0.02, atol=0)


def test_the_model_runs_in_eval_mode_and_is_left_as_it_was():
    model = small_network(SHAPE).train()
    model[0].eval()  # a part that its owner keeps frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.register_forward_hook(lambda m, _, out: seen.append((m.training, out.requires_grad)))
    groups = count_predictions(
        model,
        random_images(2, SHAPE),
        range(2),
        [(Purpose.ESTIMATION, 3000)],
        max_value=255,
        sigma=0.25,
        seed=0,
        batch_size=128,
        device="cpu",
    )
    next(groups)
    # Between two groups the model and the gradient mode are the caller's.
    assert [module.training for module in model] == [False, True, True, True, True]
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert set(seen) == {(False, False)}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_batchnorm_counts_those_of_its_running_statistics():
    model = small_network(SHAPE)
    model[1].running_mean.fill_(0.3)
    images = random_images(2, SHAPE)
    streams = [(Purpose.ESTIMATION, 400)]
    in_train_mode = counts_of(model.train(), images, range(2), streams)
    np.testing.assert_array_equal(counts_of(model.eval(), images, range(2), streams), in_train_mode)


def test_float_images_count_as_their_uint8_form():
    model, images = small_network(SHAPE), random_images(3, SHAPE)
    streams = [(Purpose.ESTIMATION, 300)]
    expected = counts_of(model, images, range(3), streams)
    actual = counts_of(model, images.float() / 255, range(3), streams, max_value=1)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"batch_size": 0}, "batch_size"),
        ({"streams": [(Purpose.SELECTION, 0)]}, "n0 and n must be >= 1"),
        ({"indices": [0]}, "2 images|indices"),
        ({"images": torch.zeros(2, 75)}, r"\(N, C, H, W\)"),
    ],
)
def test_impossible_arguments_are_refused_at_the_call(changes, message):
    arguments = {
        "images": random_images(2, SHAPE),
        "indices": [0, 1],
        "streams": [(Purpose.ESTIMATION, 10)],
        "max_value": 255,
        "sigma": 0.5,
        "seed": 0,
        "batch_size": 128,
        "device": "cpu",
    }
    with pytest.raises(CertificationError, match=message):
        count_predictions(Recorder(), **(arguments | changes))


def test_pixels_outside_the_unit_interval_are_refused():
    with pytest.raises(CertificationError, match="max_value=1"):
        counts_of(Recorder(), random_images(1, SHAPE), [0], [(Purpose.ESTIMATION, 1)], max_value=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(75, 1)), "at least 2 classes"),
        (nn.Conv2d(3, 4, 1), "at least 2 classes"),
    ],
)
def test_what_is_no_classifier_is_refused(model, message):
    with pytest.raises(CertificationError, match=message):
        counts_of(model, random_images(1, SHAPE), [0], [(Purpose.ESTIMATION, 1)])


def test_weights_that_diverged_are_refused():
    """NaN scores would otherwise read as one class, certified at the largest radius."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 3))
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(CertificationError, match="not finite"):
        counts_of(model, random_images(1, SHAPE), [0], [(Purpose.ESTIMATION, 1)])
