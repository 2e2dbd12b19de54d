"""halfstep toy-world"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def toy_world(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="New folder.")],
    walks: Annotated[int, typer.Option(min=1, help="Number of walks.")] = 8,
    frames: Annotated[int, typer.Option(min=1, help="Pictures a walk.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same walks.")] = 0,
    play: Annotated[
        bool, typer.Option("--play", help="The world that the shipped models know, walked by one who holds keys.")
    ] = False,
) -> None:
    """Make a small first-person world and walks through it: JPEG pictures and poses, as test data."""
    from halfstep.data.toy_world import write_toy_world

    write_toy_world(output, walks=walks, frames=frames, seed=seed, play=play)
    typer.echo(f"{output}: {walks} walks of {frames} pictures")
