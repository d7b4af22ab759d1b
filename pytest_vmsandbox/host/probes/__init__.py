"""Probes: each tries one capability of this host in miniature, in a child."""
