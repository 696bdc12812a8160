"""From a user's file to token ids: rows, rendering, micro-batches."""
