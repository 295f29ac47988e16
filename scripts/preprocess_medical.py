#!/usr/bin/env python3
"""The command `fastlora-medical preprocess`: check a data set and prepare it for training."""

import sys

from fastlora.medical.commands.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
