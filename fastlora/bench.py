"""`python -m fastlora.bench`: the same as the command `fastlora bench`. See `fastlora.benchmark`."""

import sys

from fastlora.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
