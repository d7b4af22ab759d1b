"""What this host can do, and who may do what on it."""
