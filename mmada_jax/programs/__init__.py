"""The programs: options, and what is printed. What they do lives on the floors below."""
