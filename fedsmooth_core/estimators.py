"""The two estimators of the smoothed classifier's input gradient (eq. 3 and eq. 4).

Both return a direction that INCREASES the loss J(x) = -log G(x)_y, so that one attack loop serves both.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from fedsmooth_core.config import AttackConfig
from fedsmooth_core.smoothing import NoisyClassifier, log_smoothed_probability, noisy_logits

Classifier = nn.Module | NoisyClassifier


class GradientEstimator(Protocol):
    """Estimate an ascent direction of J at ``x``.

    Takes images x (B, C, H, W), labels (B,) and noise (m, B, C, H, W); returns (B, C, H, W), detached.
    The model's own state is left as it is.
    """

    def __call__(self, model: Classifier, x: Tensor, labels: Tensor, noise: Tensor) -> Tensor: ...


class Stochastic:
    """Eq. 3: grad_x of -log((1/m) sum_i F_y(x + d_i)), by back-propagation to the input."""

    def __call__(self, model: Classifier, x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # A sum over the batch: each image's gradient is its own, whatever the batch size.
            loss = -log_smoothed_probability(noisy_logits(model, x, noise), labels).sum()
            (gradient,) = torch.autograd.grad(loss, x)
        return gradient


class OnePoint:
    """Eq. 4: grad_x G(x)_y ~ (1/m) sum_i (d_i / sigma^2) F_y(x + d_i), from forward passes alone.

    It estimates the gradient of the probability G_y itself; the attack descends G_y, hence the sign.

    Two unbiased forms of lower variance stand beside the plain one:

    - ``antithetic`` evaluates at x + d_i and x - d_i (twice the forward passes);
    - ``leave_one_out`` subtracts from F_y(x + d_i) the mean over the other draws, which is
      independent of d_i and hence adds nothing in expectation.
    """

    def __init__(self, sigma: float, variance_reduction: str = "none") -> None:
        self.sigma = sigma
        self.variance_reduction = variance_reduction

    @torch.no_grad()
    def __call__(self, model: Classifier, x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        num_noise_vectors = noise.shape[0]
        score = self._probability(model, x, labels, noise)
        if self.variance_reduction == "antithetic":
            score = (score - self._probability(model, x, labels, -noise)) / 2
        elif self.variance_reduction == "leave_one_out":
            # p_i - mean_{j != i} p_j
            score = (score - score.mean(0)) * (num_noise_vectors / (num_noise_vectors - 1))
        weights = score / (num_noise_vectors * self.sigma**2)
        return -torch.einsum("mb,mb...->b...", weights, noise)

    @staticmethod
    def _probability(model: Classifier, x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """F_y(x + d_i) for every copy: (m, B)."""
        probability = noisy_logits(model, x, noise).softmax(-1)
        return probability.gather(-1, labels.expand(noise.shape[:2]).unsqueeze(-1)).squeeze(-1)


def make_estimator(config: AttackConfig, sigma: float) -> GradientEstimator:
    """Return the configured estimator; ``sigma`` > 0 for the one-point form."""
    if config.estimator == "one_point":
        return OnePoint(sigma, config.variance_reduction)
    return Stochastic()
