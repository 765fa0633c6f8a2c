"""Score the cached keys of each row's candidates with its query."""
