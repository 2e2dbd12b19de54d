"""Training of models on latents."""
