"""The commands of a device, as ``fedsmooth`` calls them: they need none of the server's packages."""

import argparse
import sys

from rich.console import Console


def join(options: argparse.Namespace, console: Console) -> None:
    """``fedsmooth join``: take part in a federation until stopped."""
    from client.join import Membership
    from client.join import join as stay

    membership = Membership(
        server=options.server,
        root_certificates=options.root_certificates,
        key=options.key,
        insecure=options.insecure,
        node_config=options.node_config,
        port=options.port,
    )
    stay(membership, lambda line: console.print(line, soft_wrap=True, markup=False))


def doctor(options: argparse.Namespace, console: Console) -> None:
    """``fedsmooth doctor``: examine this device; exit status 1 when something is wrong with it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from client.doctor import Examination, Questions

    questions = Questions(
        federation=options.federation,
        node_config=options.node_config,
        server=options.server,
        root_certificates=options.root_certificates,
        key=options.key,
    )
    findings = Examination(questions, watch=console.status).run()
    table = Table("", "check", "what was found", box=box.SIMPLE_HEAD)
    for finding in findings:
        mark = Text("ok", "green") if finding.sound else Text("problem", "bold red")
        table.add_row(mark, finding.check, Text(finding.sentence, overflow="fold"))
    console.print(table)
    problems = sum(not finding.sound for finding in findings)
    if problems:
        console.print(f"{problems} to mend before this device can join.")
        sys.exit(1)
    console.print("This device can join.")
