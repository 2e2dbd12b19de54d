"""DatasetStore: latents on disk as safetensors shards, a parquet index and a manifest. Imports no torch."""

from halfstep.store.dataset import DatasetStore
from halfstep.store.maintenance import RepairReport, VerifyReport, compact, repair, verify
from halfstep.store.manifest import Manifest
from halfstep.store.writer import DatasetWriter

__all__ = ["DatasetStore", "DatasetWriter", "Manifest", "RepairReport", "VerifyReport", "compact", "repair", "verify"]
