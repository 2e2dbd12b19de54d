"""The YAML of a streamed run, and that of the older writer, as frozen values; the published files are such configs.

Keys that say something only of the older pipeline's queues and actors are accepted and named in a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, PositiveInt

from halfstep.config import Config, load_yaml
from halfstep.errors import InputError
from halfstep.stream.engine import StreamOptions
from halfstep.stream.formats import FORMATS, Fields
from halfstep.stream.model import ModelSpec
from halfstep.stream.parts import Outputs
from halfstep.stream.prepare import PadStyle, Preparation, load_mask
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.sockets import Curve
from halfstep.stream.sources.acknowledged import AcknowledgedSource
from halfstep.stream.sources.base import Source
from halfstep.stream.sources.files import FilesSource
from halfstep.stream.sources.pull import PullSource
from halfstep.stream.sources.simulated import RandomSource

_PORT = 12321


class _Section(Config):
    """`dead` are keys that change nothing here."""

    dead: ClassVar[frozenset[str]] = frozenset()


class ModelSection(_Section):
    weights_path: str | None = None
    yaml_path: Path | None = None
    peaknet_config: dict[str, Any] | None = None
    compile_mode: str | None = None
    warmup_iterations: Annotated[int | None, Field(ge=0)] = None
    warmup_samples: Annotated[int | None, Field(ge=0)] = None


class RuntimeSection(_Section):
    dead = frozenset(
        {"inter_batch_delay", "queue_num_shards", "queue_maxsize_per_shard", "queue_names", "max_empty_polls"}
        | {"poll_timeout", "memory_sync_interval", "pipeline_concurrency", "enable_output_queue"}
    )

    max_actors: Annotated[int | None, Field(ge=1)] = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    total_samples: Annotated[int | None, Field(ge=1)] = None
    num_producers: Annotated[int | None, Field(ge=1)] = None
    batches_per_producer: Annotated[int | None, Field(ge=1)] = None
    max_wait_ms: Annotated[float, Field(ge=0, le=3_600_000)] = 100.0
    queue_bytes: Annotated[int, Field(ge=1)] = 512 << 20
    overflow: Literal["block", "drop_oldest"] = "block"
    workers: Annotated[int, Field(ge=1)] = 2
    inter_batch_delay: Any = None
    queue_num_shards: Any = None
    queue_maxsize_per_shard: Any = None
    queue_names: Any = None
    max_empty_polls: Any = None
    poll_timeout: Any = None
    memory_sync_interval: Any = None
    pipeline_concurrency: Any = None
    enable_output_queue: Any = None


class DataSection(_Section):
    dead = frozenset({"input_channels"})

    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    input_channels: Any = None


class TransformsSection(_Section):
    dead = frozenset({"add_channel_dimension", "num_channels", "channel_dim", "pad_to_target"})

    pad_style: PadStyle | None = None
    add_channel_dimension: Any = None
    num_channels: Any = None
    channel_dim: Any = None
    pad_to_target: Any = None


class CurveSection(_Section):
    secret: Path
    clients: Path | None = None
    server: Path | None = None


class SourceSection(_Section):
    dead = frozenset(
        {"socket_timeout", "socket_retry_attempts", "batch_assembly", "batch_timeout", "parse_location"}
        | {"internal_parser_threads", "raw_buffer_size"}
    )

    source_type: Literal["random", "socket", "files"] = "random"
    shape: tuple[PositiveInt, PositiveInt] | tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    socket_addresses: Annotated[list[tuple[str, int]], Field(min_length=1)] | None = None
    socket_hostname: str | None = None
    socket_port: int = _PORT
    url: str | Annotated[list[str], Field(min_length=1)] | None = None
    role: Literal["bind", "connect"] = "bind"
    interface: str = "127.0.0.1"
    curve: CurveSection | None = None
    serialization_format: Literal["numpy", "npz", "hdf5", "dectris", "simplon", "halfstep"] = "numpy"
    fields: dict[str, str] = Field(default_factory=dict)
    required_fields: list[str] = Field(default_factory=list)
    largest_bytes: Annotated[int, Field(ge=1)] = 2 << 30
    sources: Annotated[int, Field(ge=1)] = 1
    path: Path | list[Path] | None = None
    normalized: Annotated[bool, Field(validation_alias=AliasChoices("normalised", "normalized"))] = False
    pad_style: PadStyle | None = None
    mask: Path | None = None
    no_data: float | None = None
    scale: Annotated[float | None, Field(gt=0)] = None
    socket_timeout: Any = None
    socket_retry_attempts: Any = None
    batch_assembly: Any = None
    batch_timeout: Any = None
    parse_location: Any = None
    internal_parser_threads: Any = None
    raw_buffer_size: Any = None


class PrecisionSection(_Section):
    dtype: str = "auto"


class OutputSection(_Section):
    dead = frozenset({"verbose"})

    output_dir: Path | None = None
    cxi: bool = True
    masks: bool = False
    file_prefix: Annotated[str, Field(pattern=r"^[^/]+$")] = "peaknet_cxi"
    buffer_size: Annotated[int, Field(ge=1)] = 100
    min_num_peak: Annotated[int, Field(ge=1)] = 10
    max_num_peak: Annotated[int, Field(ge=1)] = 2048
    patience_s: Annotated[float, Field(ge=0)] = 60.0
    push: str | None = None
    crystfel: str | None = None
    quiet: bool = False
    verbose: Any = None


class StreamFile(Config):
    """A whole file."""

    model: ModelSection = ModelSection()
    runtime: RuntimeSection = RuntimeSection()
    data: DataSection = DataSection()
    transforms: TransformsSection = TransformsSection()
    data_source: SourceSection = SourceSection()
    precision: PrecisionSection = PrecisionSection()
    output: OutputSection = OutputSection()
    ray: dict[str, Any] = Field(default_factory=dict)
    system: dict[str, Any] = Field(default_factory=dict)
    profiling: dict[str, Any] = Field(default_factory=dict)

    def dead_keys(self) -> list[str]:
        """Keys that are given and change nothing."""
        found = []
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, _Section):
                found += [f"{name}.{key}" for key in sorted(section.model_fields_set & section.dead)]
            else:
                found += [f"{name}.{key}" for key in section]
        return found


class _PeakFinding(_Section):
    min_num_peak: Annotated[int, Field(ge=1)] = 10
    max_num_peak: Annotated[int, Field(ge=1)] = 2048
    connectivity: Literal[8] = 8


class _WriterOutput(_Section):
    dead = frozenset({"create_output_dir"})

    output_dir: Path | None = None
    file_prefix: Annotated[str, Field(pattern=r"^[^/]+$")] = "peaknet_cxi"
    buffer_size: Annotated[int, Field(ge=1)] = 100
    create_output_dir: Any = None


class WriterFile(Config):
    """The older writer's file: what it says of peaks and of its output goes in the place of the run's own."""

    peak_finding: _PeakFinding = _PeakFinding()
    output: _WriterOutput = _WriterOutput()
    geometry: dict[str, Any] = Field(default_factory=dict)
    ray: dict[str, Any] = Field(default_factory=dict)
    queue: dict[str, Any] = Field(default_factory=dict)
    processing: dict[str, Any] = Field(default_factory=dict)
    system: dict[str, Any] = Field(default_factory=dict)

    def dead_keys(self) -> list[str]:
        """Keys that are given and change nothing."""
        sections = ("geometry", "ray", "queue", "processing", "system")
        own = [f"output.{key}" for key in sorted(self.output.model_fields_set & self.output.dead)]
        return own + [f"{name}.{key}" for name in sections for key, value in getattr(self, name).items() if value]


@dataclass(frozen=True)
class StreamRun:
    """All that a run needs. `push` and `crystfel` are addresses for live consumers; `notes` are for the user."""

    file: StreamFile
    options: StreamOptions
    outputs: Outputs
    notes: list[str]

    def open_source(self) -> Source:
        """The source, with its sockets bound or connected."""
        return _open_source(self.file, self.options)


def load_run(
    path: Path,
    *,
    writer: Path | None = None,
    output: Path | None = None,
    settings: tuple[str, ...] = (),
    ray: bool = False,
    lanes: int | None = None,
    device: str = "auto",
) -> StreamRun:
    """Read a config, with `settings` (`a.b=value`) in place of what is there, and the older writer's beside it. Raises
    InputError with the dotted name of what is wrong or missing."""
    file = load_yaml(path, StreamFile, settings)
    notes = [_dead(path, file.dead_keys())]
    out = file.output
    prefix, events, least, most = out.file_prefix, out.buffer_size, out.min_num_peak, out.max_num_peak
    folder = out.output_dir
    if writer is not None:
        other = load_yaml(writer, WriterFile)
        notes.append(_dead(writer, other.dead_keys()))
        prefix, events = other.output.file_prefix, other.output.buffer_size
        least, most = other.peak_finding.min_num_peak, other.peak_finding.max_num_peak
        folder = other.output.output_dir or folder
    folder = output or folder
    if folder is None:
        raise InputError(f"{path}: output.output_dir: is not given; name a folder there, or with -o")
    cxi = CxiSettings(min_peaks=least, max_peaks=most) if out.cxi else None
    outputs = Outputs(folder, cxi, prefix, out.masks)
    options = _options(path, file, events, ray=ray, lanes=lanes, device=device)
    return StreamRun(file, options, outputs, [note for note in notes if note])


def _dead(path: Path, keys: list[str]) -> str:
    return f"{path}: {', '.join(keys)}: change nothing here; they can be left out" if keys else ""


def _options(path: Path, file: StreamFile, events: int, *, ray: bool, lanes: int | None, device: str) -> StreamOptions:
    model, runtime, source = file.model, file.runtime, file.data_source
    if model.weights_path is None:
        raise InputError(
            f"{path}: model.weights_path: is not given; name the weights (or package.module:function, or a file of "
            "torch.export or TorchScript): random weights find nothing"
        )
    peaknet = _peaknet(path, model)
    shape = file.data.shape
    mask = load_mask(source.mask) if source.mask is not None else None
    style = source.pad_style or file.transforms.pad_style or "center"
    warmup = next((n for n in (model.warmup_iterations, model.warmup_samples) if n is not None), 1)
    return StreamOptions(
        ModelSpec(model.weights_path, peaknet, model.compile_mode, warmup),
        precision=file.precision.dtype,
        device=device,
        preparation=Preparation(
            channels=shape[0] if shape else 1,
            size=(shape[1], shape[2]) if shape else None,
            pad_style=style,
            normalized=source.normalized,
            mask=mask,
            no_data=source.no_data,
            scale=source.scale,
        ),
        batch_size=runtime.batch_size,
        max_wait_ms=runtime.max_wait_ms,
        queue_bytes=runtime.queue_bytes,
        drop_oldest=runtime.overflow == "drop_oldest",
        sources=source.sources,
        total_events=runtime.total_samples,
        part_events=events,
        patience_s=file.output.patience_s,
        workers=runtime.workers,
        lanes=lanes or (runtime.max_actors if ray else None),
        ray=ray,
    )


_PEAKNET_KEYS = (
    "backbone_hidden_sizes",
    "backbone_depths",
    "bifpn_num_blocks",
    "bifpn_num_features",
    "seg_out_channels",
    "uses_learned_upsample",
    "num_channels",
    "num_classes",
)


def _peaknet(path: Path, model: ModelSection) -> dict[str, Any]:
    """What the file says of the network's sizes, flat or nested as an older one."""
    content: Mapping[str, Any] = model.peaknet_config or {}
    if model.yaml_path is not None:
        content = load_yaml(model.yaml_path, dict[str, Any])
    flat = content.get("model", content)
    if not isinstance(flat, Mapping):
        raise InputError(f"{path}: model.peaknet_config.model: got {flat!r}; expected the network's sizes by name")
    return {name: flat[name] for name in _PEAKNET_KEYS if name in flat}


def _open_source(file: StreamFile, options: StreamOptions) -> Source:
    source, runtime = file.data_source, file.runtime
    if source.source_type == "random":
        return RandomSource(_random_shape(file), _random_count(runtime))
    if source.source_type == "files":
        if source.path is None:
            raise InputError("data_source.path: is not given; name files or folders of events")
        paths = source.path if isinstance(source.path, list) else [source.path]
        preparation = options.preparation
        data = source.fields.get("detector_data", source.fields.get("data"))
        return FilesSource(paths, data=data, channels=preparation.channels, size=preparation.size)
    curve = Curve(**source.curve.model_dump()) if source.curve is not None else None
    urls, bind = _urls(source), source.role == "bind"
    if source.serialization_format == "halfstep":
        return AcknowledgedSource(urls, bind=bind, window=2 * options.part_events, curve=curve)
    name = "npz" if source.serialization_format == "numpy" else source.serialization_format
    fields = Fields.of(source.fields, source.required_fields, source.shape, source.largest_bytes)
    decode = FORMATS[name]
    return PullSource(urls, lambda message: decode(message, fields), bind=bind, numbered=name == "dectris", curve=curve)


def _urls(source: SourceSection) -> list[str]:
    if source.url is not None:
        return [source.url] if isinstance(source.url, str) else source.url
    addresses = source.socket_addresses or [(source.socket_hostname or "localhost", source.socket_port)]
    if source.role == "connect":
        return [f"tcp://{host}:{port}" for host, port in addresses]
    return [f"tcp://{source.interface}:{port}" for _, port in addresses]


def _random_shape(file: StreamFile) -> tuple[int, int, int]:
    shape = file.data_source.shape or file.data.shape or (1, 512, 512)
    return (1, shape[0], shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def _random_count(runtime: RuntimeSection) -> int | None:
    if runtime.total_samples is not None or runtime.batches_per_producer is None:
        return runtime.total_samples
    return runtime.batches_per_producer * (runtime.num_producers or 1) * runtime.batch_size
