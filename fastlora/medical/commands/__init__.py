"""The command `fastlora-medical`: preprocess, train, eval and predict."""
