"""The command `dynnet`: look at models, ask them, export and time them."""
