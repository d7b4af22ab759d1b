"""The wires: networks between machines, made of frames that a switch of ours carries."""
