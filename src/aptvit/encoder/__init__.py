"""Tokens and blocks of an adapted host: `Encoder`, the cache of weights derived from the host, and ways to run it.

`Encoder` is independent of `two_pass` and `clips`, which use it. May import `aptvit.hosts`, `aptvit.layers`,
`aptvit.patching` and `aptvit.measuring`.
"""
