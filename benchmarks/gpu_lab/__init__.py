"""The Hopper kernel through the production compiler, without a GPU: what is compiled, counted and emulated.

cases.py      one product to compile, and its operands as numpy arrays
compiling.py  a process that compiles cases for an H200 and keeps what the compiler leaves: PTX, host code, resources
sass.py       the machine code of that PTX: instructions of the inner loop, registers, spills
host_code.py  the compiler's host code, run: descriptors for the copy engine, grid, parameters
ptx.py        PTX as instructions
alu.py        what instructions without memory compute
device.py     a block: warpgroups, shared memory, copies, barriers and tensor cores
"""
