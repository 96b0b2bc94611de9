"""What one rank does: the boundary around its work, and the work of each command."""
