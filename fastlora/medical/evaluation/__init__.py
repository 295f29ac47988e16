"""Metrics, tables, images, reports, prediction."""
