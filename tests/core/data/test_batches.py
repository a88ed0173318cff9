"""Mini-batches: every sample in turn, unit range, augmentation against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsmooth_core.config import DatasetConfig
from fedsmooth_core.data import ClientData, augment, load_dataset, training_batches
from fedsmooth_core.errors import DataError


def client(count, channels=3, side=6, max_value=255):
    """Samples whose label is their number, and whose first pixel too."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, max_value + 1, (count, channels, side, side), generator=generator)
    labels = torch.arange(count)
    return ClientData(images.to(torch.uint8), labels, max_value)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path))
    return load_dataset(DatasetConfig(), "train")


def test_from_dataset_copies_what_was_asked_for(digits, recwarn):
    indices = np.array([5, 3, 900])
    data = ClientData.from_dataset(digits, indices)
    assert data.images.dtype == torch.uint8
    np.testing.assert_array_equal(data.images.numpy(), digits.images[indices])
    assert data.labels.tolist() == digits.labels[indices].tolist()
    assert len(data) == data.num_examples == 3
    assert len(ClientData.from_dataset(digits)) == len(digits)
    assert not recwarn.list  # PyTorch warns of memory that it must not write to


def test_the_largest_stored_value_means_one(digits):
    x, y = ClientData.from_dataset(digits).batch(torch.arange(len(digits)))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert (x.min(), x.max()) == (0, 1)
    np.testing.assert_array_equal(x.numpy(), np.asarray(digits.images, dtype=np.float32) / 16)


@given(st.integers(1, 20), st.integers(1, 25), st.integers(1, 12), st.integers(0, 2**62))
def test_the_stream_is_one_permutation_after_another(count, batch_size, num_batches, seed):
    batches = list(training_batches(client(count), batch_size, num_batches, seeded(seed)))
    assert [len(y) for _, y in batches] == [min(batch_size, count)] * num_batches
    stream = torch.cat([y for _, y in batches])
    for permutation in stream.split(count):
        assert len(permutation.unique()) == len(permutation)


def test_images_stay_with_their_labels():
    data = client(10)
    for x, y in training_batches(data, 4, 5, seeded()):
        assert torch.equal(x, data.images[y].float() / 255)


def test_equal_generators_give_equal_batches_whatever_else_draws():
    def stream(seed, disturb):
        generator = seeded(seed)
        batches = []
        for x, y in training_batches(client(10), 4, 6, generator, flip=True, crop_padding=2):
            batches.append((x, y))
            if disturb:
                torch.randn(3, generator=generator)
        return torch.cat([x.flatten(1) for x, _ in batches])

    assert torch.equal(stream(1, disturb=False), stream(1, disturb=True))
    assert not torch.equal(stream(1, disturb=False), stream(2, disturb=False))


def test_no_sample_is_an_error():
    with pytest.raises(DataError, match="no sample"):
        training_batches(client(0), 4, 1, seeded())


def test_nothing_asked_for_leaves_images_and_generator_alone():
    x = torch.rand(4, 3, 6, 6)
    generator = seeded()
    before = generator.get_state()
    assert augment(x, generator, flip=False, crop_padding=0) is x
    assert torch.equal(generator.get_state(), before)


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3),
    st.booleans(),
)  # fmt: skip
def test_each_augmented_image_is_one_of_the_possible_ones(
    count, channels, height, width, padding, flip
):
    x = torch.rand(count, channels, height, width) + 0.1
    out = augment(x, seeded(count), flip, padding)
    assert out.shape == x.shape
    padded = torch.nn.functional.pad(x, [padding] * 4)
    for before, after in zip(padded, out, strict=True):
        crops = [
            before[:, row : row + height, column : column + width]
            for row in range(2 * padding + 1)
            for column in range(2 * padding + 1)
        ]
        possible = crops + [crop.flip(-1) for crop in crops] * flip
        assert any(torch.equal(after, candidate) for candidate in possible)


def test_half_of_the_images_are_mirrored():
    x = torch.arange(4.0).expand(4000, 1, 4, 4)
    share = (augment(x, seeded(), True, 0)[:, 0, 0, 0] == 3).float().mean()
    assert abs(share - 0.5) < 0.04  # five standard deviations


def test_crops_are_uniform():
    x = torch.zeros(9000, 1, 3, 3)
    x[:, 0, 1, 1] = 1  # with padding 1, where the dot lands tells the crop
    places = augment(x, seeded(), False, 1).sum(0)[0] / 9000
    np.testing.assert_allclose(places, np.full((3, 3), 1 / 9), atol=0.017)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_do_not_depend_on_the_device():
    here = client(50)
    there = ClientData(here.images.cuda(), here.labels.cuda(), here.max_value)
    settings = {"batch_size": 8, "num_batches": 20, "flip": True, "crop_padding": 2}
    pairs = zip(
        training_batches(here, generator=seeded(), **settings),
        training_batches(there, generator=seeded(), **settings),
        strict=True,
    )
    for (x, y), (x_there, y_there) in pairs:
        assert x_there.is_cuda
        torch.testing.assert_close(x_there.cpu(), x)
        assert torch.equal(y_there.cpu(), y)
