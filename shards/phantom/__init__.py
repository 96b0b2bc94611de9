"""The phantom: a small made-up NSD. Pictures of things in places, captions, and simulated subjects who see them."""
