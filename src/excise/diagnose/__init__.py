"""What an edit did inside a model: an original and an edited model, side by side."""
