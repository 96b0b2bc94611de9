"""The report of a study: tables over many runs, as files and as a page."""
