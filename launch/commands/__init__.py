"""What each command of `nd` does on the launching machine."""
