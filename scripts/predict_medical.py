#!/usr/bin/env python3
"""The command `fastlora-medical predict`: surfaces of structures in patient coordinates."""

import sys

from fastlora.medical.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
