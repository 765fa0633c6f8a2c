"""Mean query of every row: what a chunk asks the cached keys with."""
