from wsss_lib.allocations import Allocations, count_allocations  # noqa: F401, for the tests' imports
