"""Measuring, in one place: paired rounds, operations, memory, the machine, records, tables and plots; knows no model.

What `aptvit compare`, `evaluate` and `benchmark`, and the scripts in `benchmarks/`, have in common. They declare rows
and columns; the loop, the file and the page are here. May import nothing of aptvit.
"""
