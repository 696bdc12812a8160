"""The methods of the package, run on the worlds as a user would run them, and measured."""
