"""What is evaluated, and where its results lie: pure values."""
