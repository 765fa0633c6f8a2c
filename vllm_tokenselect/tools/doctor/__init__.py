"""`tokenselect doctor`: what is installed, and what to do where something is wrong."""
