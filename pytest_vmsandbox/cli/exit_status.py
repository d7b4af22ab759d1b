"""What `vmsandbox` exits with, beside 0 and 1: as shells use these numbers."""

# The usage was wrong; argparse says it too.
USAGE = 2

# The host, or a machine, failed us.
UNFIT = 125

NOT_EXECUTABLE = 126
NOT_FOUND = 127

# Ctrl-C, as if SIGINT had ended us.
INTERRUPTED = 128 + 2

# Nobody reads our output any more, as if SIGPIPE had ended us.
OUTPUT_CLOSED = 128 + 13
