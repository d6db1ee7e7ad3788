"""Measurements: paired rounds, operations, memory, the machine, records, tables and plots. Knows no model.

`aptvit compare`, `evaluate` and `benchmark`, and the scripts in `benchmarks/`, define rows and columns; the loop, the
file and the page are here. May import `aptvit.storage`.
"""
