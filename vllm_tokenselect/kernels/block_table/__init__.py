"""Sparse block table: which cached tokens a row attends to."""
