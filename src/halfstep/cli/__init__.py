"""The command `halfstep`: one file a verb, each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys

import typer

from halfstep.cli import bench, demo, encode, probe, store, toy_world
from halfstep.errors import HalfstepError

_INTERRUPTED = 130  # typer's exit code for Ctrl-C, the shells' 128 + SIGINT

app = typer.Typer(
    name="halfstep",
    help="Latents of generative image, video and world models, in the smallest number format measured to be enough.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(encode.encode)
app.add_typer(store.app, name="store")
app.command()(probe.probe)
app.command("toy-world")(toy_world.toy_world)
app.command()(demo.demo)
app.add_typer(bench.app, name="bench")


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    if debug:
        os.environ["HALFSTEP_DEBUG"] = "1"


def main() -> None:
    """Run the command line; errors are one line on stderr, exit code 2 for the user's input and 1 for failed work."""
    try:
        app()
    except HalfstepError as error:
        _stop(error, str(error), error.exit_code)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo(
                "halfstep: interrupted; what was complete is kept, the same command goes on from there", err=True
            )
        raise
    except Exception as error:  # noqa: BLE001 - the last line of defence, it exits with the error's name
        _stop(error, f"unexpected {type(error).__name__}: {error}; run `halfstep --debug ...` for the traceback", 1)


def _stop(error: BaseException, line: str, code: int) -> None:
    if os.environ.get("HALFSTEP_DEBUG"):
        raise error
    typer.echo(f"halfstep: {' '.join(line.split())}", err=True)
    sys.exit(code)
