"""What a model costs: of every part, for one sample, and with some of its channels gone."""
