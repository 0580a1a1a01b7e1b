"""Tests of CPython's own suites that cannot hold on our loops, each with its reason.

They are run all the same and expected to fail: an entry that starts to pass fails
the run, and has to go.
"""

PATCHES_POPEN = "patches subprocess.Popen, which the fast path does not call"
REPLACES_PIPES = "replaces loop.connect_read_pipe(), which our pipes do not go through"

DIFFERENCES = {
    "test_popen_error": PATCHES_POPEN,
    "test_popen_error_with_stdin_pipe": PATCHES_POPEN,
    "test_pause_reading": REPLACES_PIPES,
}
