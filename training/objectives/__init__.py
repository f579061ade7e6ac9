"""What a run minimises: one file per objective, each a loss over a keyed batch."""
