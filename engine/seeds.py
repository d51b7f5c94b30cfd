"""Draws: every random number and every data order follows from (seed, purpose, step), so any step can be made again."""

import hashlib
import random


def derive_seed(*parts):
    """One 63-bit seed for (seed, step, purpose): any step of any phase can be re-made without what came before."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(device, *parts):
    """A torch generator seeded for (seed, step, purpose)."""
    import torch  # here: who only reads flags and files need not wait for it

    return torch.Generator(device).manual_seed(derive_seed(*parts))


def batch_at(n, batch_size, step, *seed_parts):
    """Row numbers of the batch of `step` (from 1), by its arguments alone, of shuffled passes one after another."""
    batch = []
    for k in range((step - 1) * batch_size, step * batch_size):
        epoch, place = divmod(k, n)
        if place == 0 or not batch:
            order = list(range(n))
            random.Random(derive_seed(*seed_parts, epoch)).shuffle(order)
        batch.append(order[place])
    return batch
