"""Exit statuses of the commands, for whoever starts them. No imports: a supervisor reads them without torch."""

BAD_INPUT = 2  # a user's error, said in one line
STOPPED_EARLY = 75  # stopped on request, with work left that no checkpoint shows: start it again (EX_TEMPFAIL)
BROKEN_PIPE = 141  # the reader of standard output has gone: 128 + SIGPIPE, as of any other command
