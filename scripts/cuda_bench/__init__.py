"""What `scripts/bench cuda` is made of."""
