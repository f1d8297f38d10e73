"""Where samples may leave, how a head answers there, when a sample is confident, and how rows leave a running forward."""
