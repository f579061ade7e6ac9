"""From folders of images and captions to batches of latents and text states."""
