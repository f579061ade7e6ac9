"""Training: data, objectives, optimisers, the loop and its command lines."""
