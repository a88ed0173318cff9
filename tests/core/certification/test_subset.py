import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.errors import CertificationError


def test_the_fields_subset_is_every_20th_of_10_000():
    assert list(subset_indices(10_000, 500)) == list(range(0, 10_000, 20))


def test_all_of_them_and_an_uneven_share():
    assert list(subset_indices(5, None)) == [0, 1, 2, 3, 4]
    assert list(subset_indices(10, 4)) == [0, 2, 4, 6]
    assert list(subset_indices(10, 7)) == [0, 1, 2, 3, 4, 5, 6]


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_exactly_as_many_as_asked_and_all_exist(sizes):
    num_total, num_images = sizes
    indices = subset_indices(num_total, num_images)
    assert len(indices) == num_images
    assert indices[0] == 0
    assert indices[-1] < num_total


@pytest.mark.parametrize(("num_total", "num_images"), [(10, 11), (10, 0), (0, None)])
def test_what_cannot_be_taken_is_refused(num_total, num_images):
    with pytest.raises(CertificationError, match="num_images"):
        subset_indices(num_total, num_images)
