"""Attend to the tokens that a sparse block table names."""
