"""Each conversation between roles, as straight-line loops."""
