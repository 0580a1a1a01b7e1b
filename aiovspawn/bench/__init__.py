"""The benchmarks: aiovspawn beside the kernel's limit and its peers, in one interleaved run.

worker.py measures one thing of one contender in a process of its own, suite.py has
the plan and makes medians and ratios of it, report.py prints and plots them.
Nothing here is imported by the library.
"""
