"""Templates: machines that were prepared once, frozen, and are restored from then on."""
