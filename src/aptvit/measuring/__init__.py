"""Paired timing, operations, memory, progress, and records of long measurements; knows no model.

May import nothing of aptvit.
"""
