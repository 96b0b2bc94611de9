"""The trainable networks: per-subject voxel encoders, heads of the targets, the diffusion prior, their composition."""
