"""Adapted layers: linear, convolution, embedding; how they start; which layer fits which module."""
