"""Arithmetic whose bits depend on nothing but its inputs: not on threads, blocks, devices or libraries.

Sums rounded once and what of a change survives that (`rounding`, `rounded_sum`, `certain`, `survival`), small linear
algebra (`fixed_order`), float8 with scales (`scaled`), and corrections that lead back bit for bit (`correction`). Knows
no file, no plan and no method.
"""
