"""Where the bytes of shards come from: a folder, a server, a cache on the node."""
