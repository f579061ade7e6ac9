"""Autoencoders between pixels and latents, and the constants of their latent spaces."""
