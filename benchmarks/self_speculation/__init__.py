"""Does a model draft for itself, with selected tokens? See README.md."""
