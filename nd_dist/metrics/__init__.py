"""Pure metric functions, their statistics, and the named protocols that say exactly how the field computed them."""
