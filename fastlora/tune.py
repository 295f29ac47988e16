"""`python -m fastlora.tune`: measure the kernels on this machine's GPU. See `fastlora.ops.tune`."""

from fastlora.ops.tune import main

if __name__ == "__main__":
    raise SystemExit(main())
