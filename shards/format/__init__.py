"""What a folder of shards is: its index, its tables, and the tars themselves."""
