"""The commands of `fastlora-medical`."""
