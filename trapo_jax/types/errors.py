"""Defines the exceptions that commands translate into messages and exit codes."""

MAX_ERROR_CHARS = 2000  # maximum length of a line in an error message


class UserError(Exception):
    """An error that the user can fix. Commands print it without a traceback, and exit with code 2.

    Args:
      lines: one line per mistake, usually just one. Because a line may quote data, its line breaks are escaped, and the
        middle of a very long line is omitted.
    """

    def __init__(self, *lines: str):
        half = MAX_ERROR_CHARS // 2
        short = (x if len(x) <= 2 * half else f"{x[:half]} ... {x[-half:]}" for x in lines)
        self.lines = [line.replace("\n", "\\n") for line in short]
        super().__init__("\n".join(self.lines))


EXIT_FAILED = 1  # exit code of a process that raised `TrainingFailed`, or ended because another process failed


class TrainingFailed(Exception):
    """Training cannot continue. Committed checkpoints are kept. Commands exit with code `EXIT_FAILED`."""


class Interrupted(Exception):
    """A signal asked the process to stop. Saved data is kept, and the same command resumes the run."""
