"""The walls: what a VMM or a command of the host may see and use, and how it is kept there."""
