"""Files that are written whole or not at all, and what a run that is continued must agree on. Knows no model.

May import nothing of aptvit.
"""
