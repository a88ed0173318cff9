"""What one device can do. Needs no PyTorch: a device's facts are checked before it is imported."""

from dataclasses import dataclass

ENGINES = ("auto", "plain", "stacked", "vmap")
"""Ways to compute local training, which all do the same: see ``fedsmooth_core.cohort``."""


@dataclass(frozen=True)
class DeviceLimits:
    """What one device can do: facts of the machine, which change no hyper-parameter."""

    max_batch: int | None = None
    """Largest number of images (an image's m noisy copies count m) in one forward and backward pass;
    None passes a whole mini-batch at once. Dividing one changes the result by rounding alone."""
    bf16: bool = False
    """Compute in bfloat16 where PyTorch's autocast does; weights and their updates stay float32."""
    tf32: bool = False
    """Let CUDA round what it multiplies to TF32 (10 bits of mantissa); a CPU has no use for it."""
