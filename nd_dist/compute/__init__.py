"""What every pass through a network needs: the device, chunks that fit its memory, threads beside it."""
