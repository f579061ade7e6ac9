"""Stores the latents to which a teacher leads noise: `python -m training.trajectories OUT`."""
