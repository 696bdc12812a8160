"""What all methods share: processes, optimizer steps, meters, checkpoints and the run folder."""
