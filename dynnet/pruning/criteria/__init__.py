"""What units of channels, and single weights, are worth."""
