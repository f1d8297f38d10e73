"""One table of layer kinds: what each does to channels, how it runs on some of them, how it is cut."""
