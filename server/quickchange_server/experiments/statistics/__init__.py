"""What an experiment's variants came to: intervals, differences, decisions. Numbers in and out."""
