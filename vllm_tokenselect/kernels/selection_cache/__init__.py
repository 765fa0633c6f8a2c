"""Selection Cache: generated tokens whose queries resemble an earlier one's reuse its selection."""
