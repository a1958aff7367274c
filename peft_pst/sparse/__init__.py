"""A trained sparse model, stored and run."""
