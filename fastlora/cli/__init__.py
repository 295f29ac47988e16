"""The command `fastlora`."""
