"""`qtx-lab bench`: what things cost, beside what a user would pick instead. One file a benchmark."""
