#!/usr/bin/env python3
"""The command `fastlora-medical train`: fine-tune on medical volumes."""

import sys

from fastlora.medical.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
