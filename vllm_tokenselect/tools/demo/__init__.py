"""`tokenselect demo`: a small real model answers questions about a long document."""
