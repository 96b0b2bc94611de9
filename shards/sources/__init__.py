"""What is packed: the Natural Scenes Dataset as its authors or others publish it."""
