"""nd_dist: the library of distributed NeuralDiffuser (models, guided diffusion, metrics, training, evaluation)."""

__version__ = "0.1.0"
