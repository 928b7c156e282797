"""Real models and data out of public packages, and the scores of a runner on them."""
