from snippets.pages import small  # noqa: F401
