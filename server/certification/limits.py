"""What one caller may ask of the service, and all of them together."""

from dataclasses import dataclass

from fedsmooth_core.config import Section, at_least, setting


@dataclass(frozen=True)
class Limits(Section):
    """Bounds of a service; each is refused with ``RESOURCE_EXHAUSTED`` and one sentence.

    Raises:
        ConfigError: for a bound below 1.
    """

    SECTION = "limit"
    max_model_bytes: int = setting(512 << 20, at_least(1))
    """Length of a safetensors file."""
    max_uploads: int = setting(4, at_least(1))
    """Models that are received at a time, each in memory; others wait for a place."""
    max_queued: int = setting(1000, at_least(1))
    """Jobs that have not ended."""
    max_images: int = setting(100_000, at_least(1))
    """Images of a job."""
    max_image_size: int = setting(1024, at_least(1))
    """Side in pixels that the images of a folder are resized to."""
    max_image_sizes: int = setting(4, at_least(1))
    """Sizes in which the images of a folder are open at a time; each is a copy on the disk."""
    max_submissions: int = setting(1000, at_least(1))
    """Submissions of one job."""
    max_n: int = setting(1_000_000, at_least(1))
    """Draws for an image, n0 and n each."""
    max_images_per_call: int = setting(64, at_least(1))
    """Images in a call of Predict or Certify."""
    max_draws_per_call: int = setting(10_000_000, at_least(1))
    """Draws in a call of Predict or Certify, over all of its images."""
    max_online: int = setting(16, at_least(1))
    """Calls of Predict and Certify that wait for the device or compute."""
    max_calls: int = setting(512, at_least(1))
    """Calls of all kinds at a time, watchers among them."""
    stall_seconds: float = setting(30.0, at_least(0.1))
    """An upload that brings nothing for so long is ended."""
    upload_seconds: float = setting(600.0, at_least(0.1))
    """An upload that takes longer, whatever its size, is ended."""
    opening_seconds: float = setting(15.0, at_least(0.1))
    """How long a submission waits for images that are being opened; the opening itself goes on."""
