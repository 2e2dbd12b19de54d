"""Benchmarks: one file a case, against what people use today."""
