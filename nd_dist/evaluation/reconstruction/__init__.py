"""From voxels to decoded targets and pictures."""
