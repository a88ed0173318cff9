"""What one device can do. Needs no PyTorch: a device's facts are checked before it is imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceLimits:
    """What one device can do: facts of the machine, which change no hyper-parameter."""

    max_batch: int | None = None
    """Largest number of images (an image's m noisy copies count m) in one forward and backward pass;
    None passes a whole mini-batch at once. Dividing one changes the result by rounding alone."""
    bf16: bool = False
    """Compute in bfloat16 where PyTorch's autocast does; weights and their updates stay float32."""
