"""`python -m fastlora`: the same as the command `fastlora`."""

import sys

from fastlora.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
