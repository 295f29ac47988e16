"""The medical application: data, model, losses, metrics and training (``pip install fastlora[medical]``)."""
