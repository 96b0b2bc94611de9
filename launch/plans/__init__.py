"""Which command line starts the ranks where: pure values, from hosts to the plan."""
