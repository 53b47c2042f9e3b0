"""First on PYTHONPATH, this makes a process believe that it is an hour later than it is."""

import time

_AHEAD_SECONDS = 3600
_time, _time_ns = time.time, time.time_ns

time.time = lambda: _time() + _AHEAD_SECONDS
time.time_ns = lambda: _time_ns() + _AHEAD_SECONDS * 10**9
