"""Functions and modules that several architectures share. They depend on torch and einops alone."""
