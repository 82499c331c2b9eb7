"""A pytest plugin: a failure is told as soon as it is known, not when all is over.

For runs that a time limit may end (``-p benchmarks.first_failures``); works with xdist as well.
"""

LINES = 40  # of a failure's report


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        lines = str(report.longrepr).splitlines()[-LINES:]
        text = "\n".join(f"| {line}" for line in lines)
        print(f"\n| {report.nodeid} FAILED in {report.when}\n{text}", flush=True)
