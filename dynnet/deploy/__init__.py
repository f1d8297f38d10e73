"""Models made ready for use: batch norms folded, layers in int8."""
