"""A data set to shards: plan, pack, and the index that is written last."""
