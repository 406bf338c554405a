"""The GPU kernels: through the production compiler without a GPU, and on one.

cases.py         one product to compile, and its operands as numpy arrays
small_cases.py   those that are emulated: forms, formats and tails
compiling.py     processes that compile cases for their GPUs and keep what the compiler leaves: PTX and host code
sass.py          the machine code of that PTX: instructions of the inner loop, registers, spills
host_code.py     the compiler's host code, run: descriptors for the copy engine, grid, parameters
ptx.py           PTX as instructions
alu.py           what instructions without memory compute
memory.py        shared memory: swizzles, boxes of tiled copies, mbarriers
races.py         do warps wait for each other
tensor_cores.py  which thread holds what of a product
warpgroup.py     128 threads, and what they ask of the chip's engines
device.py        a block: its warpgroups and copies, in an order drawn at random
running.py       on the device at hand: is a product right, how long does it take
rivals.py        what else computes the same product
decoding.py      tokens a second of a whole decoder
"""
