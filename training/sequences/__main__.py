"""Command line: `python -m training.sequences CONFIG`."""

from __future__ import annotations

import sys

from training.sequences.cli import main

if __name__ == "__main__":
    sys.exit(main())
