"""What bench.py times, one file each: its options, what it measures, and how that is shown."""
