"""The agent in the guest (C, `agent/`) and the host's end of its line."""
