"""Tokens and blocks of an adapted host: `Encoder`, what keeps its derived weights fresh, and ways to run it.

`two_pass` and `clips` stand beside the encoder, which does not know them. May import `aptvit.hosts`, `aptvit.layers`,
`aptvit.patching` and `aptvit.measuring`.
"""
