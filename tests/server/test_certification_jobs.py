"""What a job of the certification service is, and what the service's code may know."""

import tomllib
from pathlib import Path

import pytest

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.models import ModelSpec
from server.certification import store
from server.certification.jobs import Job, JobTerms, Submission

ROOT = Path(__file__).parents[2]


def test_the_key_of_a_job_is_for_ever_that_of_its_version():
    """Another key, say of another field of Procedure, needs another number of the store's version."""
    job = Job(
        ModelSpec("small_cnn", "he", 10, 1, 8, 8),
        JobTerms("digits", Procedure()),
        weights="a" * 64,
        fingerprint="b" * 64,
        class_names=tuple("0123456789"),
        device="cpu",
        num_images=20,
    )
    assert (store._VERSION, job.key) == (
        1,
        "3e1c3f2007110c2fc4d1ef290fcdca83a2ffaf5d173e30a6695609d573dd3db6",
    )


@pytest.mark.parametrize("name", [".", "..", "a\nb", "a" * 201])
def test_names_of_runs_that_no_page_can_have_are_refused(name):
    with pytest.raises(ConfigError, match="at most 200 characters"):
        Submission(name)


@pytest.mark.parametrize("terms", [{"sigma": 1e38}, {"radius_step": 1e308}])
def test_lengths_that_float32_images_cannot_have_are_refused(terms):
    with pytest.raises(ConfigError, match=r"allowed is a number in \(0, 1000000"):
        Procedure(**terms)


def test_the_import_contract_names_every_module_that_is_not_the_services():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [
        one
        for one in settings["contracts"]
        if one.get("source_modules") == ["server.certification"]
    ]
    modules = {f"server.{path.stem}" for path in (ROOT / "server").glob("*.py")}
    packages = {f"server.{path.parent.name}" for path in (ROOT / "server").glob("*/__init__.py")}
    others = (modules | packages) - {"server.__init__", "server.certification"}
    named = {name for name in contract["forbidden_modules"] if name.startswith("server.")}
    assert named == others
