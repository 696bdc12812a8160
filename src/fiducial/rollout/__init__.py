"""Sampling: the Trajectory, and samplers that make one."""
