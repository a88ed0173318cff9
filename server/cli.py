"""``fedsmooth``: the command line. Each command composes the configuration and calls one function."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from fedsmooth_core.config import RunConfig, to_nested
from fedsmooth_core.errors import FedSmoothError
from server import certification_commands

_OVERRIDES = "settings as Hydra overrides, e.g. experiment=quick smoothing.sigma=0.5"
# The packages, by their import names, that the `server` extra of pyproject.toml brings.
_OF_SERVER_EXTRA = (
    *("hydra", "omegaconf", "yaml", "matplotlib", "tensorboard", "prometheus_client"),
    *("grpc_health", "grpc_reflection", "jinja2", "starlette", "uvicorn"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error the user can mend is one sentence and exit status 2."""
    options = parse(arguments)
    # Before PyTorch is loaded: on a busy machine, OpenMP threads that spin while they wait for each other
    # make the small layers of small models several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console()
    try:
        options.run(options, console)
    except FedSmoothError as error:
        _fail(str(error))
    except OSError as error:
        # A full disk, a folder without permission, a file where a folder must be.
        _fail(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OF_SERVER_EXTRA:
            raise
        _fail(
            f"This command needs {package}, which a device does without: install the server's packages, "
            "pip install -c constraints.txt -e '.[server]'."
        )
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "Interrupted: a run goes on with run_dir=... resume=true; what certifies or reproduces, with "
            "the same command.",
            soft_wrap=True,
        )
        sys.exit(130)


def _fail(sentence: str) -> NoReturn:
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(sentence)}", soft_wrap=True)
    sys.exit(2)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line; options may stand before, between and after the settings or paths."""
    commands = parser()
    options, rest = commands.parse_known_args(arguments)
    # argparse itself takes positional arguments in one run only.
    if any(word.startswith("-") for word in rest) or (rest and "more" not in options):
        commands.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        getattr(options, options.more).extend(rest)
    return options


def parser() -> argparse.ArgumentParser:
    """Return the commands and their options."""
    fedsmooth = argparse.ArgumentParser(
        prog="fedsmooth",
        description="Certifiably robust federated learning: train, certify, look.",
    )
    commands = fedsmooth.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=function)
        return sub

    def overrides(sub: argparse.ArgumentParser, several: bool = False) -> None:
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=_OVERRIDES)
        sub.set_defaults(more="overrides")
        if several:
            sub.add_argument(
                "-m",
                "--multirun",
                action="store_true",
                help="run every combination of comma-separated values",
            )

    overrides(
        command("simulate", _simulate, "Train the federation on this machine, then certify."),
        several=True,
    )
    overrides(
        command("centralized", _centralized, "Train on the pooled data, then certify."),
        several=True,
    )
    reproduce = command("reproduce", _reproduce, "Reproduce figures of the paper; continues.")
    reproduce.add_argument(
        "words",
        nargs="*",
        metavar="FIGURE_OR_KEY=VALUE",
        help="fig1 to fig11, all, or strong (the recipe beyond the paper); settings of the machine or "
        "the data, e.g. dataset.root=...",
    )
    reproduce.set_defaults(more="words")
    reproduce.add_argument(
        "--scale",
        default="paper",
        help="paper (wants a GPU; the default), cpu: smaller, or cpu-long: that for 150 rounds",
    )
    reproduce.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="models of each curve (3)"
    )
    reproduce.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder (runs/reproduce-SCALE)"
    )
    reproduce.add_argument(
        "--data", metavar="NAME", help="what to call the data set in the results"
    )
    reproduce.add_argument(
        "--plan", action="store_true", help="only show what is left and how long it takes"
    )
    certify = command("certify", _certify, "Certify a checkpoint; continues an interrupted file.")
    certify.add_argument("checkpoint", type=Path, help="a .safetensors file or a run directory")
    certify.add_argument("-o", "--output", type=Path, help="folder for the rows and the summary")
    certification_commands.connection_options(certify, required=False)
    overrides(certify)
    attack = command("attack", _attack, "Attack a checkpoint: accuracy beside certified accuracy.")
    attack.add_argument("checkpoint", type=Path, help="a .safetensors file or a run directory")
    attack.add_argument(
        "--radius",
        type=float,
        action="append",
        help="l2 budget; repeatable (sigma/2, sigma, 2 sigma)",
    )
    attack.add_argument("--steps", type=int, default=20, help="of the attack (20)")
    attack.add_argument("--draws", type=int, default=16, help="of noise, in each step (16)")
    attack.add_argument("-n", type=int, default=1000, help="fresh draws that classify (1000)")
    attack.add_argument("--images", type=int, default=100, help="how many at most (100)")
    attack.add_argument(
        "--rows", type=Path, metavar="FILE", help="certificates; else those of the run's own folder"
    )
    attack.add_argument("-o", "--output", type=Path, metavar="FILE", help="of the figures, as JSON")
    overrides(attack)
    certifier = command("certifier", _certifier, "Serve certification to others, until stopped.")
    certification_commands.certifier_options(certifier)
    token = command("token", _token, "Make a token that a certification service lets in.")
    token.add_argument("name", help="whose it is")
    token.add_argument(
        "--tokens", type=Path, required=True, metavar="FILE", help="the service's file of tokens"
    )
    token.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write it there, for its owner's eyes alone",
    )
    token.add_argument("--days", type=float, default=90, help="until it expires (90)")
    jobs = command("jobs", _jobs, "Jobs of a certification service: list, watch, fetch, cancel.")
    certification_commands.jobs_options(jobs)
    predict = command("predict", _predict, "Label images with the smoothed classifier.")
    certification_commands.predict_options(predict)
    show = command("report", _report, "Table and curve of certified accuracy of runs or row files.")
    show.add_argument("paths", nargs="+", metavar="RUN_OR_TSV")
    show.set_defaults(more="paths")
    show.add_argument("-o", "--output", type=Path, help="stem of the pictures, without suffix")
    show.add_argument("--radius-step", type=float, default=0.25, help="grid step of the table")
    show.add_argument("--json", action="store_true", help="print JSON instead of the table")
    status = command("status", _status, "Show how a run stands, also while it is under way.")
    status.add_argument("path", type=Path, metavar="RUN", help="a run directory")
    status.add_argument("--json", action="store_true", help="print JSON instead of tables")
    overrides(command("config", _config, "Print the resolved configuration; run nothing."))
    partition = command("partition", _partition, "Show what each client holds.")
    partition.add_argument("-o", "--output", type=Path, default=Path(), help="folder for pictures")
    overrides(partition)
    join = command("join", _join, "Take part in a federation with this device until stopped.")
    join.add_argument("--server", required=True, metavar="HOST:PORT", help="where to join")
    join.add_argument(
        "--root-certificates",
        type=Path,
        metavar="FILE",
        help="the server's ca.crt; else the system's",
    )
    join.add_argument("--key", type=Path, metavar="FILE", help="this device's enrolled private key")
    join.add_argument(
        "--insecure", action="store_true", help="without TLS: for tests on one machine"
    )
    join.add_argument(
        "--node-config",
        default="",
        metavar="FACTS",
        help="facts of this device, e.g. 'data-path=\"/data/images\" threads=2'",
    )
    join.add_argument("--port", type=int, help="loopback port of this device's own (a free one)")
    deploy = command("deploy", _deploy, "Train at a SuperLink; submit the run again when it dies.")
    _superlink_option(deploy)
    deploy.add_argument(
        "--max-restarts",
        type=int,
        default=5,
        metavar="N",
        help="give up after N restarts in a row without a new round (5)",
    )
    overrides(deploy)
    certificates = command("certificates", _certificates, "Make a CA and a server certificate.")
    certificates.add_argument("folder", type=Path)
    certificates.add_argument(
        "--host", action="append", default=[], help="name or IP address of the server; repeatable"
    )
    doctor = command("doctor", _doctor, "Examine this device before it joins a federation.")
    doctor.add_argument(
        "--federation",
        type=Path,
        required=True,
        metavar="FILE",
        help="federation.json of the joining kit",
    )
    doctor.add_argument("--node-config", default="", metavar="FACTS", help="as for join")
    doctor.add_argument(
        "--server", metavar="HOST:PORT", help="as for join; else no connection is tried"
    )
    doctor.add_argument("--root-certificates", type=Path, metavar="FILE", help="as for join")
    doctor.add_argument("--key", type=Path, metavar="FILE", help="as for join")
    enroll = command("enroll", _enroll, "Let a device take part; without a name, list them.")
    enroll.add_argument("name", nargs="?", help="what the device is called from now on")
    enroll.add_argument("--public-key", type=Path, help="the device's .pub file")
    enroll.add_argument("-o", "--output", type=Path, help="folder to make a new key pair in")
    _superlink_option(enroll)
    revoke = command("revoke", _revoke, "Take a device's key off the list, for good.")
    revoke.add_argument("name")
    _superlink_option(revoke)
    invite = command("invite", _invite, "Write what a device needs to check itself and to join.")
    invite.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of the joining kit"
    )
    invite.add_argument("--root-certificates", type=Path, help="the ca.crt to put beside it")
    overrides(invite)
    return fedsmooth


def _superlink_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--superlink", help="name of a connection in Flower's config.toml")


def _simulate(options: argparse.Namespace, console: Console) -> None:
    # Imported here: Flower and torch take seconds, and `fedsmooth report` needs neither.
    from server.observers import standard_observers
    from server.progress import TrainingProgress
    from server.simulation import quiet_flower, simulate

    quiet_flower()

    def run(config: RunConfig) -> Path:
        progress = TrainingProgress(console)
        observers = standard_observers(progress, console)
        return simulate(config, console, observers, progress.client_done).path

    _run_all(options, console, run)


def _centralized(options: argparse.Namespace, console: Console) -> None:
    from server.centralized import run_centralized
    from server.observers import standard_observers
    from server.progress import TrainingProgress

    def run(config: RunConfig) -> Path:
        observers = standard_observers(TrainingProgress(console), console)
        return run_centralized(config, console, observers).path

    _run_all(options, console, run, defaults=["training=centralized"])


def _reproduce(options: argparse.Namespace, console: Console) -> None:
    from server.reproduction.reproduce import reproduce

    reproduce(
        options.words,
        options.scale,
        options.seeds,
        options.output,
        options.data,
        options.plan,
        console,
    )


def _run_all(
    options: argparse.Namespace,
    console: Console,
    run: Callable[[RunConfig], Path],
    defaults: Sequence[str] = (),
) -> None:
    from server.configuration import compose
    from server.multirun import run_sweep

    if options.multirun:
        run_sweep(options.overrides, defaults, console, run)
    else:
        run(compose(options.overrides, defaults))


def _deploy(options: argparse.Namespace, console: Console) -> None:
    from server.supervisor import deploy

    run = deploy(
        options.overrides,
        options.superlink,
        options.max_restarts,
        console,
    )
    console.print(f"Finished: {run}", soft_wrap=True, markup=False, highlight=False)


def _certificates(options: argparse.Namespace, console: Console) -> None:
    from server.certificates import ensure_certificates

    made = ensure_certificates(options.folder, options.host)
    what = f"Made {', '.join(made)} in" if made else "Left as they are: the certificates in"
    console.print(f"{what} {options.folder}", soft_wrap=True, markup=False)


def _certify(options: argparse.Namespace, console: Console) -> None:
    from fedsmooth_core.checkpoint import load_checkpoint
    from server.certify import certify_checkpoint, find_checkpoint
    from server.configuration import load, with_overrides
    from server.report import show

    if options.output is None and (options.checkpoint / "config.yaml").is_file():
        run = with_overrides(
            to_nested(load(options.checkpoint)), options.overrides, str(options.checkpoint)
        )
        run = certification_commands.with_service(run, options)
        if run.service.address is not None:
            from server.collection import collect_run

            collect_run(options.checkpoint, run, console)
            return
    path = find_checkpoint(options.checkpoint)
    recorded = load_checkpoint(path).metadata.get("config")
    config = with_overrides(recorded, options.overrides, str(path.with_suffix(".json")))
    config = certification_commands.with_service(config, options)
    folder = options.output or _certification_folder(path)
    certify = certify_checkpoint
    if config.service.address is not None:
        certify = certification_commands.certify_at_service
        if options.service is None:  # but recorded
            console.print(
                f"Certifying at {config.service.address}; service.address=null certifies here.",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )
    rows = certify(path, config, folder, console)
    show([rows], folder / "curve", config.certification.radius_step, console)


def _attack(options: argparse.Namespace, console: Console) -> None:
    from fedsmooth_core.checkpoint import load_checkpoint
    from server import attacked
    from server.certify import find_checkpoint
    from server.configuration import with_overrides
    from server.owed import ROWS

    radii = None if options.radius is None else tuple(options.radius)
    terms = attacked.AttackTerms(radii, options.steps, options.draws, options.n, options.images)
    path = find_checkpoint(options.checkpoint)
    recorded = load_checkpoint(path).metadata.get("config")
    config = with_overrides(recorded, options.overrides, str(path.with_suffix(".json")))
    own = _certification_folder(path) / ROWS
    rows = options.rows or (own if own.is_file() else None)
    if rows is not None:
        attacked.refuse_terms_of_rows(rows, options.overrides)
    output = options.output or (rows or own).with_name(attacked.ATTACK)
    found = attacked.attack_checkpoint(path, config, rows, terms, console, output)
    attacked.print_attack(found, console)
    console.print(f"Figures: {output}", soft_wrap=True, markup=False, highlight=False)
    if found["holds"] is False:
        sys.exit(1)


def _certification_folder(checkpoint: Path) -> Path:
    """Return the run's own folder for the checkpoint's round, or one beside a loose checkpoint."""
    folder = checkpoint.resolve().parent
    if folder.name == "checkpoints":
        return folder.parent / "certification" / checkpoint.stem
    return folder / f"{checkpoint.stem}-certification"


def _certifier(options: argparse.Namespace, console: Console) -> None:
    certification_commands.certifier(options, console)


def _token(options: argparse.Namespace, console: Console) -> None:
    certification_commands.token(options, console)


def _jobs(options: argparse.Namespace, console: Console) -> None:
    certification_commands.jobs(options, console)


def _predict(options: argparse.Namespace, console: Console) -> None:
    certification_commands.predict(options, console)


def _report(options: argparse.Namespace, console: Console) -> None:
    from server.report import report, show

    paths = [Path(path) for path in options.paths]
    if options.json:
        report(paths, options.output, options.radius_step, as_json=True)
    else:
        show(paths, options.output or Path("certified-accuracy"), options.radius_step, console)


def _status(options: argparse.Namespace, console: Console) -> None:
    from server.status import show_status

    show_status(options.path, console, options.json)


def _config(options: argparse.Namespace, console: Console) -> None:
    from server.configuration import compose, to_yaml

    console.file.write(to_yaml(compose(options.overrides)))


def _partition(options: argparse.Namespace, console: Console) -> None:
    from server.configuration import compose
    from server.partition_report import report_partition

    for picture in report_partition(compose(options.overrides), options.output):
        console.print(f"Picture: {picture}", soft_wrap=True, markup=False)


def _join(options: argparse.Namespace, console: Console) -> None:
    from client.commands import join

    join(options, console)


def _doctor(options: argparse.Namespace, console: Console) -> None:
    from client.commands import doctor

    doctor(options, console)


def _enroll(options: argparse.Namespace, console: Console) -> None:
    from server.enrolment import make_key, register

    if options.name is None:
        _list_devices(options, console)
        return
    if (options.public_key is None) == (options.output is None):
        _fail(
            "Give the device's public key with --public-key FILE, or -o FOLDER to make a key pair there."
        )
    public_key = options.public_key
    if options.output is not None:
        private = make_key(options.output, options.name)
        public_key = private.with_name(f"{private.name}.pub")
        console.print(f"Key for the device, and for nobody else: {private}", soft_wrap=True)
    new = register(public_key, options.name, options.superlink)
    console.print(f"{options.name} is enrolled{'' if new else ' already'}.", markup=False)


def _list_devices(options: argparse.Namespace, console: Console) -> None:
    from rich.table import Table

    from server.enrolment import enrolled

    table = Table("device", "status", "node id")
    for device in enrolled(options.superlink):
        status = "revoked" if device.revoked else device.status
        table.add_row(escape(device.name), escape(status), str(device.node_id))
    console.print(table)


def _invite(options: argparse.Namespace, console: Console) -> None:
    from server.configuration import compose
    from server.invitation import invite

    for path in invite(compose(options.overrides), options.output, options.root_certificates):
        console.print(f"For the devices: {path}", soft_wrap=True, markup=False)


def _revoke(options: argparse.Namespace, console: Console) -> None:
    from server.enrolment import revoke

    new = revoke(options.name, options.superlink)
    text = "is revoked: its node has to leave, and that key is never taken again"
    console.print(f"{options.name} {text if new else 'was revoked before'}.", markup=False)
