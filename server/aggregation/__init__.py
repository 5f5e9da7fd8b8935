"""From the sites' weights to the next weights."""
