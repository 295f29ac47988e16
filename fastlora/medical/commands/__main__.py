"""`python -m fastlora.medical.commands`: as `fastlora-medical`."""

import sys

from fastlora.medical.commands.main import main

sys.exit(main())
