"""Arithmetic whose bits depend only on its inputs: not on threads, block sizes, devices or libraries.

It covers sums that are rounded once, and how much of a change survives the rounding (`rounding`, `rounded_sum`,
`certain`, `survival`), small linear algebra (`fixed_order`), float8 with scales (`scaled`), and corrections that
restore a tensor bit for bit (`correction`). It knows no file, no plan and no method.
"""
