"""NSD to WebDataset shards and back: readers, packer, index, stream, and a phantom NSD."""
