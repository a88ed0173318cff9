"""PREDICT (Cohen, Rosenfeld and Kolter, ICML 2019): the smoothed classifier's class, or abstain."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor, nn

from fedsmooth_core.certification.bounds import ABSTAIN, check_alpha
from fedsmooth_core.certification.counting import count_predictions
from fedsmooth_core.seeding import Purpose


def predict(
    model: nn.Module,
    images: Tensor,
    indices: Sequence[int],
    *,
    max_value: float,
    sigma: float,
    n: int,
    alpha: float,
    seed: int,
    batch_size: int | None,
    device: torch.device | str,
) -> NDArray[np.int64]:
    """Predict with the smoothed classifier: n draws, then a two-sided binomial test of the top two.

    With probability at least 1 - alpha for each image, the answer is the smoothed classifier's
    class or :data:`~fedsmooth_core.certification.bounds.ABSTAIN`. Arguments are as in
    :func:`~fedsmooth_core.certification.certify.certify`; the draws are a stream of their own.

    Returns:
        (N,) classes, ``ABSTAIN`` where the draws do not separate the top two at level alpha.

    Raises:
        CertificationError: as :func:`~fedsmooth_core.certification.certify.certify`.
    """
    check_alpha(alpha)
    counted = count_predictions(
        model,
        images,
        indices,
        [(Purpose.PREDICTION, n)],
        max_value=max_value,
        sigma=sigma,
        seed=seed,
        batch_size=batch_size,
        device=device,
    )
    labels = [_decide(counts, alpha) for _, group in counted for counts in group[:, 0]]
    return np.array(labels, dtype=np.int64)


def _decide(counts: NDArray[np.int64], alpha: float) -> int:
    top, second = np.argsort(-counts, kind="stable")[:2]
    n_a, n_b = int(counts[top]), int(counts[second])
    # Two-sided, since the data chose which of the two is called A.
    if binomtest(n_a, n_a + n_b, 0.5).pvalue <= alpha:
        return int(top)
    return ABSTAIN
