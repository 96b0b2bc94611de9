"""The guided sampler: schedule, self-attention guidance, guidance losses, noise, and the loop over steps."""
