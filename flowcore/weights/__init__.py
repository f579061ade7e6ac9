"""Weight files: reading, checking, writing."""
