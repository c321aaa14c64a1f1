"""Exit statuses of the commands. This module imports nothing, so that a supervisor can read them without torch."""

BAD_INPUT = 2  # a user's error, reported in one line
STOPPED_EARLY = 75  # stopped on request with work remaining that no checkpoint shows: start it again (EX_TEMPFAIL)
BROKEN_PIPE = 141  # the reader of standard output has ended: 128 + SIGPIPE, as for other commands
