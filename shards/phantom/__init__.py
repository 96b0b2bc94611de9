"""The phantom, a small made-up data set: pictures of things in places, captions, and subjects who see them."""
