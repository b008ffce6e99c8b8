"""Methods that act while a model trains: policies over the label of each token."""
