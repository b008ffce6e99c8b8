"""Models as folders, and what is inside them."""
