"""`python -m forgetless` is the command line, as torchrun and accelerate launch need it."""

from __future__ import annotations

import sys

from forgetless.cli import main

if __name__ == "__main__":
    sys.exit(main())
