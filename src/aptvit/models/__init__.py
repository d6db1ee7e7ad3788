"""What users hold: adaptive models of timm's and of transformers' hosts, and their files.

May import `aptvit.scorers`, `aptvit.encoder`, `aptvit.hosts`, `aptvit.layers` and `aptvit.patching`.
"""
