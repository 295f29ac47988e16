"""Volumes, masks and the samples made of them."""
