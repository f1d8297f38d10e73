"""Where samples may leave, how heads answer, when a sample is confident, and how rows leave a running forward."""
