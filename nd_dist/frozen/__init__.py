"""Frozen networks: Stable Diffusion, the guidance CLIP, and the targets they define. Nothing here is trained."""
