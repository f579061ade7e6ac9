"""The architectures as ComfyUI's own MODEL, CLIP and VAE objects. Imported when a node runs, not at start."""
