"""Schedules of weights other than int4, counted like those of tpu_model.py: bundles of a step of 1024 x 1024 codes.

Bundles at 16, 64, 128 and 512 rows of x, each (groups of 32, groups of 128), by libtpu 0.0.52. Codebooks are nf4: what
a level costs to look up (tpu_tables.py) hides how its scale is applied, and groups of 32 fill half of a register.
"""

from typing import Any

OTHERS: dict[str, dict[str, Any]] = {
    "int8": {
        "v4": {
            "direct": ((6966, 6110), (10590, 7118), (16109, 9331), (45573, 19403)),
            "wscale": ((7054, 7003), (7646, 7645), (8640, 8681), (16068, 15441)),
        },
        "v5e": {
            "direct": ((1269, 914), (4113, 1378), (8461, 3263), (32197, 9839)),
            "integer": ((1187, 467), (2340, 816), (4928, 1770), (20632, 5498)),
            "wscale": ((1721, 1594), (2144, 1961), (2770, 2663), (8780, 8767)),
        },
        "v6e": {
            "direct": ((860, 628), (2377, 908), (5336, 1931), (18275, 5574)),
            "integer": ((793, 471), (2125, 805), (4806, 1376), (16169, 4947)),
            "wscale": ((674, 652), (837, 831), (1040, 1035), (2870, 2857)),
        },
        "tpu7x": {
            "direct": ((948, 666), (2474, 993), (5522, 2009), (18298, 5620)),
            "wscale": ((759, 744), (843, 823), (975, 963), (2243, 2260)),
        },
    },
    "table": {
        "v4": {
            "direct": ((11128, 5296), (13772, 5933), (16348, 7356), (38133, 13029)),
            "wscale": ((6724, 6160), (7140, 6590), (7332, 6790), (10349, 10149)),
        },
        "v5e": {
            "direct": ((4616, 2129), (5546, 2502), (9753, 4375), (33718, 10258)),
            "wscale": ((3130, 2806), (3483, 3139), (3805, 3507), (9541, 9160)),
        },
        "v6e": {
            "direct": ((5117, 2393), (6027, 2675), (8029, 4077), (19848, 7288)),
            "wscale": ((2907, 2492), (3049, 2632), (3273, 2864), (4431, 3983)),
        },
        "tpu7x": {
            "direct": ((5130, 2405), (6042, 2670), (7887, 3872), (19709, 7221)),
            "wscale": ((2908, 2489), (2991, 2575), (3129, 2711), (3836, 3427)),
        },
    },
}
for _chips in OTHERS.values():
    _chips["v5p"] = _chips["v5e"]
    _chips["unknown"] = {form: bundles for form, bundles in _chips["v6e"].items() if form != "integer"}
