"""`qtx-lab bench`: what methods cost, beside what a user would choose instead; one file a benchmark."""
