"""Hugging Face models in the roles of alignment: policy, reference, critic, reward model."""
