"""A finished evaluation for people: the page, its tables and figures."""
