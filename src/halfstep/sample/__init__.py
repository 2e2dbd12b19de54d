"""Samples of trained networks as files: pictures and videos from an EqM, walks from a CDiT or livestream."""

from halfstep.sample.options import SampleOptions
from halfstep.sample.samples import SampleReport, sample
from halfstep.verbs import make_callable

__all__ = ["SampleOptions", "SampleReport", "sample"]

make_callable(__name__)
