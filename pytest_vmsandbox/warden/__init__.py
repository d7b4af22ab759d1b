"""The warden: the one process that acts with privilege, and the walls it puts around others."""
