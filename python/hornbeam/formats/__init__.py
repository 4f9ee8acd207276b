"""What a path or a file object stands for: every format, and how it is written and read."""
