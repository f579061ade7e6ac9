"""Speed and memory of every architecture, beside the machine's matrix product and the original code."""
