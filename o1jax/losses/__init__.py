"""Losses and estimators: pure functions of one trajectory, vmapped by the caller.

Every array is float32 and every function says so first: rewards made with
`zeros_like(token_ids)` are integers, and 0.7 becomes 0 without a word.
A loss returns a sum and a count, so that callers can add both over devices and
microbatches before they divide.
"""
