"""What is done with packed shards afterwards: verify, repair, export."""
