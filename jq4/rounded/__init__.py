"""Functions run with weights that are rounded and not packed, for what is differentiated by them.

value.py        a rounded weight on its way through a traced function, and what shall be rounded where it is used
products.py     products with it, whose inputs are rounded too
steps.py        a learned step of inputs, as it is stored
interpreter.py  the interpreter that carries both
record.py       what was not rounded
"""
