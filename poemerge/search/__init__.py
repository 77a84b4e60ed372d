"""Choosing the merge's settings on validation data: the space, the sweep, its figures, and writing the winner back."""
