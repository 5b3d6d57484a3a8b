"""Samples, features, metrics and the report.

Imports every wing except `orchestration`.
"""
