"""Who does which piece of work, and where its result lies: leases on shared storage."""
