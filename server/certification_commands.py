"""What `fedsmooth certifier, token, jobs, predict` and `certify --service` do."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from fedsmooth_core.config import RunConfig, from_nested
from fedsmooth_core.errors import CertificationError, ConfigError, ServiceError

if TYPE_CHECKING:  # PyTorch and gRPC take seconds, and `fedsmooth --help` needs neither
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from fedsmooth_core.models import ModelSpec
    from server.certification.client import Answer, CertificationClient, Connection
    from server.certification.jobs import Job

_SHORT = 12
"""Digits of a key that tables show; commands take as few as tell it apart."""

_MOST_JOBS = 1000


# --------------------------------------------------------------------------------------------------
# Options


def connection_options(sub: argparse.ArgumentParser, required: bool) -> None:
    """Add where the service is, and how to be let in."""
    sub.add_argument(
        "--service", required=required, metavar="HOST:PORT", help="the certification service"
    )
    sub.add_argument(
        "--root-certificates",
        type=Path,
        metavar="FILE",
        help="the ca.crt of the service; else the system's",
    )
    sub.add_argument("--token-file", type=Path, metavar="FILE", help="holds the bearer token")
    sub.add_argument(
        "--client-certificate", type=Path, metavar="FILE", help="where the service asks for one"
    )
    sub.add_argument("--client-key", type=Path, metavar="FILE", help="its private key")
    sub.add_argument(
        "--insecure", action="store_true", help="without TLS: for a service on this machine"
    )


def connection(options: argparse.Namespace) -> "Connection":
    """Return the connection that the options describe."""
    _quiet_grpc()
    from server.certification.client import Connection

    return Connection(
        options.service,
        options.root_certificates,
        options.token_file,
        options.client_certificate,
        options.client_key,
        options.insecure,
    )


def _client(where: "Connection") -> "CertificationClient":
    _quiet_grpc()
    from server.certification.client import CertificationClient

    return CertificationClient(where)


def _quiet_grpc() -> None:
    # Its own lines about handshakes would stand above the sentence that says what is wrong. It looks at
    # this once, when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def with_service(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """Return a run's settings with what the options say about the service."""

    def absolute(path: Path | None) -> str | None:
        return None if path is None else str(path.absolute())

    if options.service is None:
        return config
    said = from_nested(
        type(config.service),
        {
            "address": options.service,
            "root_certificates": absolute(options.root_certificates),
            "token_file": absolute(options.token_file),
            "client_certificate": absolute(options.client_certificate),
            "client_key": absolute(options.client_key),
            "insecure": options.insecure,
            "dataset": config.service.dataset,
            "patience_seconds": config.service.patience_seconds,
        },
    )
    return replace(config, service=said)


def certifier_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of ``fedsmooth certifier``."""
    sub.add_argument("--directory", type=Path, required=True, help="of its jobs, models and rows")
    sub.add_argument(
        "--listen",
        default="127.0.0.1:50061",
        metavar="HOST:PORT",
        help="of gRPC (127.0.0.1:50061)",
    )
    sub.add_argument("--certificate", type=Path, metavar="FILE", help="its server.crt, for TLS")
    sub.add_argument("--key", type=Path, metavar="FILE", help="its server.key")
    sub.add_argument(
        "--client-authority",
        type=Path,
        metavar="FILE",
        help="callers must show a certificate that this ca.crt signed",
    )
    sub.add_argument(
        "--tokens", type=Path, metavar="FILE", help="callers must send a token of this file"
    )
    sub.add_argument("--insecure", action="store_true", help="no TLS: on this machine's loopback")
    sub.add_argument(
        "--http", metavar="HOST:PORT", help="serve the page, /metrics and /health there; else none"
    )
    sub.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="images that jobs may name (test/<class>/*, train/<class>/*); repeatable",
    )
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:K (auto)")
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads of PyTorch")
    sub.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="noisy images in one forward pass (what is fast for the model)",
    )
    sub.add_argument(
        "--drop-superseded",
        action="store_true",
        help="a newer model of a run, known by its name, drops the unfinished jobs of older ones",
    )
    for option, value, text in (
        ("--max-model-mib", 512, "MiB of a model"),
        ("--max-queued", 1000, "jobs that have not ended"),
        ("--max-images", 100_000, "images of a job"),
        ("--max-n", 1_000_000, "draws for an image"),
        ("--max-images-per-call", 64, "images in a call of Predict or Certify"),
        ("--max-calls", 512, "calls at a time, watchers among them"),
    ):
        sub.add_argument(
            option, type=int, default=value, metavar="N", help=f"at most so many {text} ({value})"
        )


def jobs_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of ``fedsmooth jobs``."""
    sub.add_argument("key", nargs="?", help="a job: its first digits do; without it, list jobs")
    sub.add_argument(
        "--run", dest="of_run", default="", metavar="RUN", help="list the jobs of this run alone"
    )
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--watch", action="store_true", help="show its progress until it has ended")
    what.add_argument("--cancel", action="store_true", help="take it out of the queue")
    what.add_argument("--fetch", type=Path, metavar="FOLDER", help="write its rows and summary")
    connection_options(sub, required=True)


def predict_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of ``fedsmooth predict``."""
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    sub.set_defaults(more="images")
    sub.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN_OR_FILE",
        help="compute on this machine with this model",
    )
    sub.add_argument("--model", metavar="KEY", help="with --service: a job, or a weights' hash")
    connection_options(sub, required=False)
    sub.add_argument("--certify", action="store_true", help="with the radius that keeps each label")
    sub.add_argument("--sigma", type=float, help="noise level; else the one of the model's run")
    sub.add_argument("--n0", type=int, default=100, help="with --certify: draws that select (100)")
    sub.add_argument("--n", type=int, default=1000, help="draws an image (1000)")
    sub.add_argument(
        "--alpha", type=float, default=0.001, help="failure probability of each answer (0.001)"
    )
    sub.add_argument("--device", default="auto", help="with --checkpoint: auto, cpu or cuda")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")


# --------------------------------------------------------------------------------------------------
# The service


def certifier(options: argparse.Namespace, console: Console) -> None:
    """Serve until told to end."""
    import torch

    from server.certification.limits import Limits
    from server.certification.main import ServiceOptions, run_service

    if options.threads is not None:
        if options.threads < 1:
            raise ConfigError(f"--threads {options.threads} is out of range: allowed is >= 1.")
        torch.set_num_threads(options.threads)
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size} is out of range: allowed is >= 1.")
    limits = Limits(
        max_model_bytes=options.max_model_mib << 20,
        max_queued=options.max_queued,
        max_images=options.max_images,
        max_n=options.max_n,
        max_images_per_call=options.max_images_per_call,
        max_calls=options.max_calls,
    )
    service = ServiceOptions(
        options.directory,
        listen=options.listen,
        certificate=options.certificate,
        key=options.key,
        client_authority=options.client_authority,
        tokens=options.tokens,
        insecure=options.insecure,
        http=options.http,
        data=_folders(options.data),
        device=options.device,
        batch_size=options.batch_size,
        drop_superseded=options.drop_superseded,
        limits=limits,
    )
    run_service(service, _line(console))


def _folders(named: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for one in named:
        name, found, folder = one.partition("=")
        if not found or not name or not folder:
            raise ConfigError(f"--data {one} names no folder: give NAME=FOLDER.")
        if name in folders:
            raise ConfigError(f"--data names {name} twice: give each name one folder.")
        folders[name] = Path(folder)
    return folders


def token(options: argparse.Namespace, console: Console) -> None:
    """Make a token, and print it, this once, or write it to a file."""
    from server.certification.auth import make_token, write_token

    made, expires = make_token(options.name, options.tokens, options.days)
    if options.output is None:
        print(made)  # alone on the standard output: the rest is for eyes
        where = "It is kept nowhere: put it into a file for --token-file that you alone may read."
    else:
        write_token(made, options.output)
        where = f"It is in {options.output}, for --token-file, and kept nowhere else."
    Console(stderr=True).print(
        f"For {options.name}, until {expires:%Y-%m-%d %H:%M} UTC. {where}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


# --------------------------------------------------------------------------------------------------
# Jobs


def jobs(options: argparse.Namespace, console: Console) -> None:
    """List jobs, or look at one, follow it, cancel it, or fetch what it made."""
    with _client(connection(options)) as client:
        if options.key is None:
            if options.watch or options.cancel or options.fetch:
                raise ConfigError("--watch, --cancel and --fetch are about one job: give its key.")
            _list(client.jobs(run=options.of_run), console)
            return
        job = _find(client, options.key)
        if options.cancel:
            job = client.cancel(job.key)
        elif options.watch:
            job = _follow(client, job, console)
        elif options.fetch:
            # A job on some of the images does not say how many there are.
            total = job.num_images if job.terms.num_images is None else None
            rows = _fetch(client, job, options.fetch, total)
            _line(console)(f"Rows: {rows}")
            return
        _show(job, console)


def _find(client: "CertificationClient", name: str) -> "Job":
    """Return the job whose key, or whose weights' hash, begins so."""
    if len(name) == 64:
        try:
            return client.get(name)
        except ServiceError as error:
            if error.status != "NOT_FOUND":
                raise
    known = client.jobs(limit=_MOST_JOBS)
    found = [job for job in known if name and job.key.startswith(name)]
    # Any of the jobs with these weights will do.
    found = found or [job for job in known if name and job.weights.startswith(name)]
    if not found:
        raise ServiceError(
            f"there is no job {name[:80]!r}: fedsmooth jobs lists what there is.", "NOT_FOUND"
        )
    if len({job.key if job.key.startswith(name) else job.weights for job in found}) > 1:
        raise ConfigError(f"{len(found)} jobs begin with {name!r}: give more digits of the key.")
    return found[0]


def _list(found: Sequence["Job"], console: Console) -> None:
    from rich.table import Table

    from server.certification.jobs import Submission

    if not found:
        _line(console)("No jobs.")
        return
    table = Table(box=None, pad_edge=False)
    columns = ("key", "state", "run", "round", "model", "data set", "sigma", "n", "how", "images")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for job in found:
        # Somebody without a run may have submitted the same model later.
        last = next((one for one in reversed(job.submissions) if one.run), Submission())
        procedure = job.terms.procedure
        precision = [procedure.precision] if procedure.precision != "float32" else []
        table.add_row(
            job.key[:_SHORT],
            job.state.value,
            escape(last.run) or "-",
            str(last.round) if last.run else "-",
            escape(job.spec.name),
            escape(job.terms.dataset),
            f"{procedure.sigma:g}",
            str(procedure.n),
            ", ".join([procedure.method, *precision]),
            f"{job.images_done} of {job.num_images}",
        )
    _print_whole(table, console)


def _show(job: "Job", console: Console) -> None:
    procedure = job.terms.procedure
    say = _line(console)
    say(f"Job {job.key}")
    say(f"  {job.state.value}, {job.images_done} of {job.num_images} images, {job.seconds:.1f} s")
    if job.problem:
        say(f"  {job.problem}")
    for one in job.submissions:
        if one.run:
            say(f"  round {one.round} of {one.run}")
    say(f"  {job.spec.name} on {job.terms.dataset}, weights {job.weights[:_SHORT]}")
    say("  " + ", ".join(f"{name} {value}" for name, value in procedure.terms.items()))


def _follow(client: "CertificationClient", job: "Job", console: Console | None) -> "Job":
    from server.progress import counting
    from server.service_jobs import progress_note

    with counting(console, f"Job {job.key[:_SHORT]}", job.num_images) as advance:
        done = 0
        for progress in client.watch(job.key, rows_seen=job.num_images):
            job = progress.job
            if job.images_done > done:
                advance(
                    progress_note(progress.summary, progress.seconds_left), job.images_done - done
                )
                done = job.images_done
    return job


def _fetch(
    client: "CertificationClient", job: "Job", folder: Path, num_test_images: int | None
) -> Path:
    """Write what there is of a job as local certification would; return the path of the rows."""
    from server.certify import write_summary
    from server.owed import ROWS
    from server.service_jobs import write_rows

    rows, job = client.fetch(job.key)
    if not rows:
        raise CertificationError(
            f"the job {job.key[:_SHORT]} has no rows yet: it is {job.state.value}."
        )
    parameters = write_rows(rows, job, folder)
    write_summary(folder, parameters, num_test_images, job.terms.procedure.radius_step)
    return folder / ROWS


# --------------------------------------------------------------------------------------------------
# A checkpoint


def certify_at_service(
    path: Path, config: RunConfig, folder: Path, console: Console | None = None
) -> Path:
    """Have a checkpoint certified by the configured service; return the path of the rows.

    Raises:
        FedSmoothError: when the service does not answer or refuses, or the job does not come to its end.
    """
    from fedsmooth_core.checkpoint import load_checkpoint
    from server.service_jobs import connection_of, submit_checkpoint

    with _client(connection_of(config)) as client:
        job = submit_checkpoint(client, path, config)
        job = _follow(client, job, console)
        if job.images_done < job.num_images:
            raise CertificationError(
                f"the job {job.key} is {job.state.value} after {job.images_done} of {job.num_images} "
                f"images{f': {job.problem}' if job.problem else '.'}"
            )
        dataset = load_checkpoint(path).metadata.get("dataset", {})
        return _fetch(client, job, folder, dataset.get("num_test_images"))


# --------------------------------------------------------------------------------------------------
# Predictions


def predict(options: argparse.Namespace, console: Console) -> None:
    """Label images with a smoothed classifier, here or at a service."""
    if (options.checkpoint is None) == (options.service is None):
        raise ConfigError(
            "give the model: --checkpoint RUN_OR_FILE for one of this machine, or --service HOST:PORT "
            "with --model KEY."
        )
    if (options.model is None) != (options.service is None):
        raise ConfigError("--service and --model belong together: fedsmooth jobs lists the keys.")
    answers = _answers_here(options) if options.checkpoint else _answers_of_service(options)
    if options.json:
        found = [
            {"image": str(path), **_plain(answer, options.certify)}
            for path, answer in zip(options.images, answers, strict=True)
        ]
        console.file.write(json.dumps(found, indent=2) + "\n")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("image", "label", *(["radius"] if options.certify else [])):
        table.add_column(column, no_wrap=True)
    for path, answer in zip(options.images, answers, strict=True):
        radius = [f"{answer.radius:.4f}" if answer.class_name else "-"] if options.certify else []
        table.add_row(escape(str(path)), escape(answer.class_name or "ABSTAIN"), *radius)
    _print_whole(table, console)


def _plain(answer: "Answer", with_radius: bool) -> dict[str, Any]:
    label = {"label": answer.label if answer.class_name else None}
    name = {"class_name": answer.class_name or None}
    return label | name | ({"radius": answer.radius} if with_radius else {})


def _answers_of_service(options: argparse.Namespace) -> list["Answer"]:
    with _client(connection(options)) as client:
        job = _find(client, options.model)
        images = _images(options.images, job.spec)
        answers: list[Answer] = []
        # A few at a time: a service bounds what one call may bring.
        for start in range(0, len(images), _IMAGES_A_CALL):
            part = images[start : start + _IMAGES_A_CALL]
            if options.certify:
                answers += client.certify(
                    job.key,
                    part,
                    n0=options.n0,
                    n=options.n,
                    alpha=options.alpha,
                    sigma=options.sigma,
                )
            else:
                answers += client.predict(
                    job.key, part, n=options.n, alpha=options.alpha, sigma=options.sigma
                )
        return answers


_IMAGES_A_CALL = 8


def _answers_here(options: argparse.Namespace) -> list["Answer"]:
    import secrets

    import torch

    from fedsmooth_core.certification.bounds import ABSTAIN
    from fedsmooth_core.certification.certify import certify
    from fedsmooth_core.certification.precision import in_precision
    from fedsmooth_core.certification.predict import predict
    from fedsmooth_core.checkpoint import load_checkpoint, load_model
    from fedsmooth_core.device import choose_device
    from server.certification.client import Answer
    from server.certify import find_checkpoint
    from server.configuration import with_overrides
    from server.service_jobs import described

    path = find_checkpoint(options.checkpoint)
    checkpoint = load_checkpoint(path)
    spec, _ = described(checkpoint, path)
    numbers = [str(label) for label in range(spec.num_classes)]
    names = checkpoint.metadata["dataset"].get("class_names", numbers)
    config = with_overrides(checkpoint.metadata.get("config"), [], str(path.with_suffix(".json")))
    device = choose_device(options.device)
    # As its run certifies it, so it serves: in another precision it is another classifier.
    model = in_precision(load_model(checkpoint).to(device), config.certification.precision)
    images = torch.from_numpy(_images(options.images, spec))
    common: dict[str, Any] = {
        "max_value": 255,
        "sigma": options.sigma if options.sigma is not None else config.certified_sigma,
        "n": options.n,
        "alpha": options.alpha,
        # Fresh noise, which nobody who made an image could foresee.
        "seed": secrets.randbelow(2**62),
        "batch_size": config.certification.batch_size,
        "device": device,
    }

    def answer(label: int, radius: float | None = None) -> Answer:
        return Answer(label, "" if label == ABSTAIN else names[label], radius)

    positions = range(len(images))
    if options.certify:
        unknown = torch.full((len(images),), ABSTAIN)
        rows = certify(model, images, unknown, positions, n0=options.n0, **common)
        return [answer(row.predict, row.radius) for row in rows]
    return [answer(int(label)) for label in predict(model, images, positions, **common)]


def _images(paths: Sequence[str], spec: "ModelSpec") -> "NDArray[np.uint8]":
    """Read images as a model takes them: its size, grey or RGB.

    Raises:
        ConfigError: for a model that takes neither grey nor RGB images.
        DataError: naming the file that is no image.
    """
    import numpy as np
    from PIL import Image

    from fedsmooth_core.data.imagefolder import decode_image

    if spec.channels not in (1, 3):
        raise ConfigError(
            f"the model takes images of {spec.channels} channels, and image files have 1 or 3: send them "
            "with a client of your own."
        )
    images = np.empty((len(paths), spec.channels, spec.height, spec.width), np.uint8)
    for image, path in zip(images, paths, strict=True):
        rgb = decode_image(Path(path), (spec.width, spec.height))
        if spec.channels == 1:
            image[:] = np.asarray(Image.fromarray(rgb.transpose(1, 2, 0)).convert("L"))
        else:
            image[:] = rgb
    return images


def _print_whole(table: "Table", console: Console) -> None:
    # As wide as it needs: rich would shorten keys to fit a narrow terminal.
    unlimited = console.options.update(max_width=100_000)
    table.width = console.measure(table, options=unlimited).maximum
    console.print(table, soft_wrap=True)


def _line(console: Console) -> Callable[[str], None]:
    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    return say
