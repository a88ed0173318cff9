"""Which test images a certification looks at."""

from fedsmooth_core.errors import CertificationError


def subset_indices(num_total: int, num_images: int | None) -> range:
    """Return evenly spaced dataset indices: every k-th image from 0, k = num_total // num_images.

    The field's way to certify part of a test set (every 20th of CIFAR-10's 10,000 makes 500).

    Args:
        num_total: images in the test set, >= 1.
        num_images: how many of them, or None for all.

    Returns:
        Exactly ``num_images`` indices in [0, num_total).

    Raises:
        CertificationError: unless 1 <= num_images <= num_total.
    """
    wanted = num_total if num_images is None else num_images
    if not 1 <= wanted <= num_total:
        raise CertificationError(
            f"num_images={wanted} cannot be taken from {num_total} test images: allowed is 1 to "
            f"{num_total}."
        )
    skip = num_total // wanted
    return range(0, skip * wanted, skip)
