"""How good samples and predictions are: FID, world models, energies."""
