"""Methods that edit a trained model."""
