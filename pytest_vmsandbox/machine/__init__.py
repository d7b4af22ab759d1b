"""The machine that a test holds: guest and VMM, introduced to each other."""
