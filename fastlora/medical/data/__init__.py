"""Samples made of scans: grids, regions and slices, their splits, and the cache."""
