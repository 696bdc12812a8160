"""From a user's file to token ids: reading rows, rendering them and cutting micro-batches."""
