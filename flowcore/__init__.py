"""FlowCore: rectified-flow diffusion transformers for plain Python, training, and ComfyUI."""
