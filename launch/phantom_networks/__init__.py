"""Trains the phantom's networks (VAE, CLIP, UNet, judges): small, of the real diffusers and transformers classes."""
