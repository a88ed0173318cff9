"""Published results and the oracle, beside the repository where there is a shared folder."""

from pathlib import Path

import pytest

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "data" / "certify_reference"

needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="no shared/data/certify_reference beside the repository"
)
