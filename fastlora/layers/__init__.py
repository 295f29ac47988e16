"""Adapted layers: linear, convolution, embedding; their initialisation; the layer class for each kind of module."""
