"""Soft vote: every head spreads one vote over a row's candidates."""
