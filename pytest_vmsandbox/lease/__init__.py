"""Who holds what, across workers and crashes."""
