"""Which channels are computed for which input: what gates decide on, the networks that decide, layers under them."""
