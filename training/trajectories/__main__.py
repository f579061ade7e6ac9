"""Entry of `python -m training.trajectories`."""

from __future__ import annotations

import sys

from training.trajectories.cli import main

if __name__ == "__main__":
    sys.exit(main())
