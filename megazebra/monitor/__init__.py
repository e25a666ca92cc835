"""A run watched from a terminal while it goes on: its metrics followed, understood and drawn. No torch."""
