"""Raw files to a prepared folder: readers, cleaning, splits, candidate lists, task mixing."""
