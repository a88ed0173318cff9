import pytest
from flower_processes import running_deployment


@pytest.fixture
def deployment(tmp_path_factory):
    """A deployment without TLS and keys, of one test; nothing of it is left afterwards."""
    with running_deployment(tmp_path_factory.mktemp("deployment")) as running:
        yield running
