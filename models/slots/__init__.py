"""Cache slots: where keys and values of rows lie, the state of rows, and attention over slots."""
