"""The commands of a device, as ``fedsmooth`` calls them: they need none of the server's packages."""

import argparse

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
