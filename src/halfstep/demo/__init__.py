"""The demonstration: a toy world through the codec, training and sampling, with a report."""
