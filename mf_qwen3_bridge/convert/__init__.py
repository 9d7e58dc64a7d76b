"""A checked input into a directory: jobs, file layout, crash-safe output, several workers."""
