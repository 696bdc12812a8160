"""The shipped methods, run on the worlds as a user would run them, and measured along the way."""
