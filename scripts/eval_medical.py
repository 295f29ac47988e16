#!/usr/bin/env python3
"""The command `fastlora-medical eval`: compare a run with the base model on held-out regions."""

import sys

from fastlora.medical.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
