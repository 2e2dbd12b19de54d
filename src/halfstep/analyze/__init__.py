"""How sampling runs move through latent space: metrics, comparisons of groups, plots and a report."""

from halfstep.analyze.analysis import Analysis, analyze
from halfstep.analyze.groups import group_by_file, group_by_prompt
from halfstep.analyze.metrics import METRICS
from halfstep.analyze.output import claim_output, full_document, write_output
from halfstep.analyze.storage import StorageComparison, compare_storage
from halfstep.verbs import make_callable

__all__ = [
    "METRICS",
    "Analysis",
    "StorageComparison",
    "analyze",
    "claim_output",
    "compare_storage",
    "full_document",
    "group_by_file",
    "group_by_prompt",
    "write_output",
]

make_callable(__name__)
