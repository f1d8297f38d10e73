"""Which channels of which layers live and die together, and layers on a subset of their channels."""
