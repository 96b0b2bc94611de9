"""Programs that a maintainer runs once, to make data that the packages ship."""
