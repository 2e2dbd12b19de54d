"""Sources of pixels and latents, and torch datasets over them."""
