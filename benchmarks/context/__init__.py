"""How long a row trains on a card of 48 GB."""
