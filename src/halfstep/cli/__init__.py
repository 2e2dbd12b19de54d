"""The command `halfstep`: one file a verb, each imports what it needs when it runs."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from halfstep.cli import (
    analyze,
    audit,
    bench,
    demo,
    encode,
    evaluate,
    generate,
    live,
    memory,
    probe,
    sample,
    store,
    stream,
    toy_world,
    train,
    view,
)
from halfstep.cli.paths import refuse_urls
from halfstep.errors import HalfstepError
from halfstep.extras import missing
from halfstep.team import is_launched, leave

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
app.command()(train.train)
app.command()(sample.sample)
app.add_typer(evaluate.app, name="eval")
app.command()(generate.generate)
app.command()(analyze.analyze)
app.add_typer(stream.app, name="stream")
app.command()(live.live)
app.command()(view.view)
app.command()(probe.probe)
app.command()(audit.audit)
app.command()(memory.memory)
app.command("toy-world")(toy_world.toy_world)
app.command()(demo.demo)
app.add_typer(bench.app, name="bench")
refuse_urls(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from halfstep import __version__

        typer.echo(f"halfstep {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Say which this is."),
) -> None:
    if debug:
        os.environ["HALFSTEP_DEBUG"] = "1"


def main() -> NoReturn:
    """Run the command line; errors are one line on stderr, exit code 2 for the user's input and 1 for failed work."""
    warnings.showwarning = _show_warning  # this process is ours
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be UTF-8, and must not end the run when printed
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _run()
    if is_launched():
        leave(code)
    sys.exit(code)


def _run() -> int:
    try:
        code = app(standalone_mode=False) or 0
    except HalfstepError as error:
        return _failed(error, str(error), error.exit_code)
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a verb: its message is its help
            typer.echo(error.format_message())
            return error.exit_code
        line = f"{error.format_message().rstrip('.')}; `halfstep ... --help` lists the options"
        return _failed(error, line, error.exit_code)
    except ImportError as error:
        verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "halfstep")
        if (known := missing(error, verb)) is None:
            return _unexpected(error)
        return _failed(known, str(known), known.exit_code)
    except Exception as error:  # noqa: BLE001 - the last line of defense, it exits with the error's name
        return _unexpected(error)
    if code == _INTERRUPTED:
        typer.echo(
            "halfstep: interrupted; what was complete is kept (encode, train, sample and stream go on when "
            "run again, generate with --resume)",
            err=True,
        )
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Our own as a line like all others; those of libraries as Python shows them."""
    if f"{os.sep}halfstep{os.sep}" in filename:
        typer.echo(f"halfstep: {message}", err=True)
    else:
        typer.echo(warnings.formatwarning(message, category, filename, lineno).rstrip(), err=True)


def _unexpected(error: Exception) -> int:
    line = f"unexpected {type(error).__name__}: {error}; run `halfstep --debug ...` for the traceback"
    return _failed(error, line, 1)


def _failed(error: Exception, line: str, code: int) -> int:
    if os.environ.get("HALFSTEP_DEBUG"):
        traceback.print_exception(error)
    else:
        typer.echo(f"halfstep: {' '.join(line.split())}", err=True)
    return code
