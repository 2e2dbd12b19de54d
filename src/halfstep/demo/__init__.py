"""The demonstration: a toy world through the codec and back, with a report."""
