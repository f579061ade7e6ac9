"""Text encoders for plain Python: prompts to conditioning. Each file imports its own heavy packages."""
