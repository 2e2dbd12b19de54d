"""halfstep live"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfstep.errors import InputError

if TYPE_CHECKING:
    import torch

    from halfstep.live import FrameModel

_SOURCES, _OUTPUTS = ("keys", "camera", "video", "none"), ("browser", "file", "mjpeg")


def live(
    ckpt: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="A model that takes actions; without it, the shipped world.")
    ] = None,
    data_path: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Latents that walks of CKPT begin with.")
    ] = None,
    autoencoder: Annotated[str | None, typer.Option(metavar="ID", help="Of latents that do not say theirs.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="ID", help="A diffusers image-to-image pipeline, for --input camera or video.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the pipeline makes of pictures.")] = None,
    strength: Annotated[
        float | None, typer.Option(min=0.05, max=1.0, help="How far it goes from them, by default 0.5.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels of the pipeline's pictures, by default 512x512.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="|".join(_SOURCES),
            help="By default keys, of a pipeline camera; none: nothing is pressed.",
        ),
    ] = None,
    video: Annotated[Path | None, typer.Option(metavar="FILE", help="For --input video.")] = None,
    output: Annotated[str, typer.Option(metavar="|".join(_OUTPUTS), help="Where frames go.")] = "browser",
    file: Annotated[Path | None, typer.Option("-o", metavar="MP4", help="For --output file.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="At most so many, for --output file.")] = 240,
    seed: Annotated[int, typer.Option(min=0, help="Where it begins, and the noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of a frame, at most 8.")] = 4,
    precision: Annotated[str, typer.Option(metavar="fp32|bf16|fp16", help="May be changed while it runs.")] = "fp32",
    skip_below: Annotated[
        float | None,
        typer.Option(min=0.0, help="Leave out pictures that differ less from the last one (RMS, of 255)."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Who reaches it can watch and play.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8020,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what it did as JSON in the end.")] = False,
) -> None:
    """Walk through a world that a model makes frame by frame, in the browser."""
    source = source or ("keys" if pipeline is None else "camera")
    _require(source, output, file, video)
    of_pipeline = {"--prompt": prompt, "--strength": strength, "--size": size}
    if pipeline is not None and ckpt is not None:
        raise InputError("--pipeline and --ckpt: give one of them")
    _require_use("--ckpt", ckpt, {"--data-path": data_path, "--autoencoder": autoencoder})
    _require_use("--pipeline", pipeline, of_pipeline)
    from halfstep.live import LiveEngine
    from halfstep.machine import open_device
    from halfstep.web.live.run import serve_live, write_live
    from halfstep.web.server import is_loopback

    place = open_device(device)
    model, title = _open(
        ckpt, data_path, autoencoder, pipeline, prompt or "", strength or 0.5, size or "512x512", place
    )
    spec = model.spec
    if source in ("keys", "none") and not spec.takes_actions:
        raise InputError(f"--input: got {source}; {title} takes pictures: give camera or video")
    if source in ("camera", "video") and not spec.takes_pictures:
        raise InputError(f"--input: got {source}; {title} takes actions: give keys or none")
    engine = LiveEngine(model, place, precision=precision, steps=steps, seed=seed, skip_below=skip_below)
    if output == "file":
        assert file is not None
        facts = write_live(engine, spec, file, frames=frames, video=video)
        line = f"{file}: {facts['frames']} frames, {facts['frames_per_second']} a second, in {facts['precision']}"
        for name, count in facts["not_finite"].items():
            line += f"; {count} were not finite in {name}"
    else:

        def listening(url: str) -> None:
            shown = url if output == "browser" else f"{url}stream.mjpg"
            typer.echo(f"{shown}: Ctrl-C ends it", err=json)
            if not is_loopback(host):
                typer.echo("anyone who reaches this address can watch, and the first one plays", err=json)
            if output == "browser" and not no_open:
                import webbrowser

                webbrowser.open(url)

        facts = serve_live(
            engine, spec, title=title, source=source, video=video, host=host, port=port, listening=listening
        )
        line = f"{facts['frames']} frames"
    typer.echo(json_module.dumps(facts) if json else line)


def _require(source: str, output: str, file: Path | None, video: Path | None) -> None:
    if source not in _SOURCES:
        raise InputError(f"--input: got {source!r}; expected one of {', '.join(_SOURCES)}")
    if output not in _OUTPUTS:
        raise InputError(f"--output: got {output!r}; expected one of {', '.join(_OUTPUTS)}")
    if (output == "file") != (file is not None):
        raise InputError("--output file and -o MP4 go together; give both or neither")
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        why = "is a folder; name a file in it" if file.is_dir() else "its folder is not there; make it, or name another"
        raise InputError(f"-o: {file}: {why}")
    if (source == "video") != (video is not None):
        raise InputError("--input video and --video FILE go together; give both or neither")
    if output != "browser" and source in ("keys", "camera"):
        raise InputError(f"--output: got {output}; {source} come from a browser, give --input none or video")


def _require_use(given_with: str, present: object, options: Mapping[str, object]) -> None:
    """What nothing would look at is refused."""
    for flag, value in options.items():
        if value is not None and present is None:
            raise InputError(f"{flag}: got {value}; it is for {given_with}, which is not given")


def _open(
    ckpt: Path | None,
    data_path: Path | None,
    autoencoder: str | None,
    pipeline: str | None,
    prompt: str,
    strength: float,
    size: str,
    device: torch.device,
) -> tuple[FrameModel, str]:
    """The model, and what to call it."""
    if pipeline is not None:
        from halfstep.live.pipelines import open_pipeline

        model: Any = open_pipeline(pipeline, prompt, device, size=_parse_size(size), strength=strength)
        return model, pipeline
    from halfstep.live.opening import open_walk

    walk = open_walk(ckpt, device, data_path=data_path, autoencoder=autoencoder)
    return walk, "the toy world" if ckpt is None else str(ckpt)


def _parse_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--size: got {text!r}; expected WxH in pixels")
    return int(parts[0]), int(parts[1])
