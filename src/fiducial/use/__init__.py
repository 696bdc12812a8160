"""What is done with a model: generate, collect, label steps, evaluate, best of n."""
