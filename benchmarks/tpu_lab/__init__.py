"""TPU products through the production compiler, without the hardware: what is compiled, counted and modelled.

chips.py       what a chip can do at best: clock, bandwidth, MXU
compiling.py   a jitted function compiled for a chip that is not there
bundles.py     the compiler's last dump: bundles, loops, units in use, spills
hlo.py         how often each operation of a program runs, and the HBM bytes it moves
traffic.py     the HBM bytes of a Pallas kernel, by its grid and index maps
model.py       the time that follows
contenders.py  our kernel and what it is compared with
worker.py      a process that compiles what it is told, one line of JSON a job
jobs.py        the jobs' other end: starts workers, and survives those that die
"""
