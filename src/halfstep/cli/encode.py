"""halfstep encode"""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from halfstep.errors import InputError, some

if TYPE_CHECKING:
    from halfstep.data.sources import SourceConfig
    from halfstep.encode import EncodeReport
    from halfstep.encode.clips import LastClip


def encode(
    more: Annotated[list[Path] | None, typer.Argument(metavar="SRC", help="More sources.")] = None,
    source: Annotated[
        list[Path] | None,
        typer.Option("-i", "--input", metavar="SRC", help="Folder, file, or YAML list of sources; may be repeated."),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder of the store.")] = ...,  # type: ignore[assignment]
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="ID", help="dct8, pixels, toy, a diffusers hub id or folder, or the folder of taef2."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    precision: Annotated[
        str, typer.Option(metavar="P", help="fp32, bf16-true, bf16-mixed, 16-true, 16-mixed or auto (measured).")
    ] = "auto",
    storage: Annotated[str | None, typer.Option(metavar="TYPE", help="fp16, bf16 or fp32.")] = None,
    size: Annotated[str | None, typer.Option(metavar="N|WxH", help="Pixels that the autoencoder sees.")] = None,
    clip_length: Annotated[
        int | None, typer.Option(metavar="N", help="Frames to a latent, for an autoencoder that compresses time.")
    ] = None,
    last_clip: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Frames after the last whole clip: drop them, pad the clip with the last frame, or overlap: begin "
            "earlier.",
        ),
    ] = None,
    stride: Annotated[int | None, typer.Option(metavar="N", help="Take every N-th frame of videos.")] = None,
    fps: Annotated[float | None, typer.Option(metavar="F", help="Take F frames a second of videos.")] = None,
    moments: Annotated[bool, typer.Option("--moments", help="Keep the variance too, for fresh samples.")] = False,
    mirror: Annotated[bool, typer.Option("--mirror", help="Store the flipped pictures' latents too.")] = False,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Samples to a batch.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read and decode.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first sequences, as many as reach N items.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first failure.")] = False,
    keep_missing: Annotated[bool, typer.Option("--keep-missing", help="Keep what the sources no longer have.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    ray: Annotated[bool, typer.Option("--ray", help="Spread the work over a Ray cluster.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Encode pictures, videos or walks into a latent store; run it again to bring the store up to date."""
    paths = [*(source or []), *(more or [])]
    if not paths:
        raise InputError("encode: no source; give at least one with -i")
    from halfstep.cli.progress import Bar
    from halfstep.encode import EncodeOptions
    from halfstep.encode import encode as run_encode
    from halfstep.engine import RayCrew

    options = EncodeOptions(
        output=output,
        autoencoder=autoencoder,
        revision=revision,
        precision=precision,
        storage=storage,
        size=_parse_size(size),
        clip_length=clip_length,
        last_clip=cast("LastClip | None", last_clip),  # any other word is refused when the job is settled
        moments=moments,
        mirror=mirror,
        batch_size=_parse_batch_size(batch_size),
        workers=workers,
        limit=limit,
        strict=strict,
        keep_missing=keep_missing,
        device=device,
    )
    sources = _read_sources(paths, stride, fps)
    with Bar("encoding", "items", hidden=quiet) as progress:
        crew = RayCrew() if ray else None
        report = run_encode(sources, options, dry_run=dry_run, progress=progress, crew=crew)
    if progress.speaks:
        typer.echo(json_module.dumps(asdict(report)) if json else _summary(report, keep_missing))
    raise typer.Exit(1 if report.failed else 0)


def _read_sources(paths: list[Path], stride: int | None, fps: float | None) -> list[SourceConfig]:
    from halfstep.config import load_yaml, validate
    from halfstep.data.sources import SourceConfig

    thinning = {name: value for name, value in (("stride", stride), ("fps", fps)) if value is not None}
    sources: list[SourceConfig] = []
    for path in paths:
        if path.suffix in (".yaml", ".yml") and not path.is_dir():
            if thinning:
                raise InputError(
                    f"{path}: lists its sources; set {' and '.join(thinning)} there, not on the command line"
                )
            sources += load_yaml(path, list[SourceConfig])
        else:
            sources.append(validate({"path": path, **thinning}, SourceConfig, Path(f"encode -i {path}")))
    return sources


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not width.isdecimal() or (height and not height.isdecimal()):
        raise InputError(f"--size: got {text!r}; expected N or WxH in pixels")
    return int(width), int(height or width)


def _parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--batch-size: got {text!r}; expected a positive number or auto")
    return int(text)


def saving(latents: int, fp32: int, sources: int | None) -> str:
    """What latents take, in bytes, against what they would take in fp32 and what their sources do."""
    in_fp32 = f"{latents / fp32:.0%} of fp32 latents"
    if not sources:
        return f"{_size(latents)} of latents: {in_fp32}; not all of their sources are there to compare with"
    share = latents / sources
    told = f"{share:.1f} times" if share > 1 else f"{share:.{1 if share < 0.1 else 0}%} of"
    return f"{_size(latents)} of latents: {told} the sources ({_size(sources)}), {in_fp32}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _summary(report: EncodeReport, keep_missing: bool) -> str:
    did = "would encode" if report.dry_run else "encoded"
    lines = [
        f"{did} {report.encoded} items, {report.skipped} unchanged, {report.removed} "
        f"{'to remove' if report.dry_run else 'removed'}, {report.failed} failed; precision {report.policy}"
    ]
    if not report.dry_run:
        lines.append(
            f"{report.store}: {report.items} items in {report.sequences} sequences, "
            f"{report.items_per_second:.1f} items/s"
        )
    if report.bytes:
        lines.append(saving(report.bytes, report.fp32_bytes, report.source_bytes))
    if report.retried_in_fp32:
        lines.append(f"{report.retried_in_fp32} items overflowed in half precision and were encoded again in fp32")
    if report.left_out:
        lines.append(
            f"{sum(report.left_out.values())} frames after the last whole clip of {len(report.left_out)} videos are "
            "left out (--last-clip pad or overlap keeps them)"
        )
    if report.missing:
        what = "kept, though the sources no longer have them" if keep_missing else "no longer in the sources"
        lines.append(f"{len(report.missing)} sequences {what}: {some(report.missing)}")
    if report.unused:
        files = [f"{key} (1 of {count + 1})" for key, count in report.unused.items()]
        lines.append(
            f"{len(files)} animations: only the first frame of each is encoded: {some(files)}; with `kind: videos` in "
            "a YAML list of sources all frames are"
        )
    lines += [f"failed: {failure.reason}" for failure in report.failures[:5]]
    if report.failed and not report.dry_run:
        lines.append(f"{report.failed} failed in all; why is in {Path(report.store) / 'failures.jsonl'}")
    return "\n".join(lines)
