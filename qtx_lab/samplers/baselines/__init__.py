"""What others do, to compare with; some of it is biased, and says so."""
