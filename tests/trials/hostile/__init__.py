"""Hostile files: made by seed, and given to every command that reads files of their kind."""
