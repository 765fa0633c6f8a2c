"""Rows of one query: their selection and their attention as one call a layer."""
