"""Metrics, tables, pictures, reports, prediction."""
