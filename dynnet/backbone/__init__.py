"""What is known of somebody's model: its names and its input, kinds of layers, dry runs, checks."""
