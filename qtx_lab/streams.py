"""Where random numbers come from: a counter-based stream that every device computes alike."""
