"""halfstep view"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def view(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders; nothing outside of them is shown.")],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Who reaches it sees these folders.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8010,
    autoencoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Decodes latents that do not say their own.")
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
) -> None:
    """Show stores, recorded runs, training runs and streamed runs in a browser, until Ctrl-C."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not on this machine is not fetched to show a picture
    from halfstep.team import leave
    from halfstep.web.server import is_loopback, serve
    from halfstep.web.view import view_app

    def listening(url: str) -> None:
        typer.echo(f"{url}: Ctrl-C ends it")
        if not is_loopback(host):
            typer.echo("anyone who reaches this address sees these folders")
        if not no_open:
            import webbrowser
            from threading import Thread

            Thread(target=webbrowser.open, args=[url], daemon=True).start()  # one in the terminal runs until it is left

    serve(view_app(paths, autoencoder=autoencoder), host=host, port=port, listening=listening)
    leave(0)  # without waiting for a store that is being verified
