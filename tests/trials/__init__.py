"""Trials that take minutes: damage done to the product on purpose, and what became of it.

`python -m tests.trials --minutes 20` runs them all; `kinds.py` lists them.
"""
