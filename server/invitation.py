"""The joining kit: what an operator hands to whoever holds a device."""

from pathlib import Path

from fedsmooth_core.config import RunConfig
from fedsmooth_core.data import load_dataset
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.invitation import Invitation
from fedsmooth_core.models import ModelSpec


def invite(config: RunConfig, folder: Path, root_certificates: Path | None) -> list[Path]:
    """Write ``folder/federation.json``, and the server's ``ca.crt`` beside it when it is given.

    Opens the data set, for the class names and the image size are the server's.

    Raises:
        ConfigError, DataError: when the certificate is none, or the data set cannot be opened.
    """
    certificate = None
    if root_certificates is not None:
        certificate = root_certificates.read_bytes()
        if b"BEGIN CERTIFICATE" not in certificate or b"PRIVATE KEY" in certificate:
            raise ConfigError(f"{root_certificates} is not a certificate alone: give the ca.crt.")
    images = load_dataset(config.dataset, "train")
    info = images.info
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "federation.json"]
    Invitation(
        info.class_names,
        config.plan,
        ModelSpec.of(config.model, info),
        config.federation.most_examples(len(images)),
    ).write(paths[0])
    if certificate is not None:
        paths.append(folder / "ca.crt")
        paths[1].write_bytes(certificate)
    return paths
