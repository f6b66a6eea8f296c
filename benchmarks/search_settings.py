"""What `search_value` compares and tries: ways to search, by name."""

from __future__ import annotations

from search_paths import Descents, Different, Trees

from o1jax import search
from o1jax.sampling.draw import Drawing

BUDGETS = (100, 200, 400)  # generated tokens a problem; a greedy path takes some 35
COOLER = Drawing(0.7)
Way = Descents | Different | Trees

# Chosen on dev, see docs/benchmarks.md: children of a descent's step; of a node, and simulations.
WIDTHS = {100: 4, 200: 10, 400: 20}
TREES = {100: (4, 5), 200: (8, 5), 400: (16, 5)}
ROLLED_OUT = {100: (2, 2), 200: (2, 4), 400: (3, 5)}  # with two children 300 tokens use a tree up
RULES: dict[str, dict[int, Way]] = {
  'guided': {b: Descents(k) for b, k in WIDTHS.items()},
  'puct': {b: Trees(search.puct, *n, mix=1.0, c=0.1) for b, n in TREES.items()},
  'uct': {b: Trees(search.uct, *n, mix=1.0, c=0.1) for b, n in TREES.items()},
  'gumbel': {b: Trees(search.gumbel_interior, *n, mix=1.0) for b, n in TREES.items()},
  'guided, prior': {b: Descents(k, prior=0.5) for b, k in WIDTHS.items()},
  'UCT, voted': {b: Trees(search.uct, *n, mix=0.0, c=0.3) for b, n in ROLLED_OUT.items()},
  'cooler, voted': {
    b: Trees(search.uct, *n, mix=0.0, c=0.3, how=COOLER) for b, n in ROLLED_OUT.items()
  },
}
VOTED = ('UCT, voted', 'cooler, voted')  # rolled out to the end; the paths found answer by vote
# Solved training problems: as the loop's synthesis searches.
SYNTHESIS: dict[str, Way] = {
  'guided, 1 descent': Descents(6, 1, temperature=0.5),
  'guided, 2 descents': Descents(6, 2, temperature=0.5),
  'guided, 4 descents': Descents(6, 4, temperature=0.5),
  'UCT, 4 roll-outs': Trees(search.uct, 4, 1, mix=0.0, c=2.0),
  'UCT, 12 roll-outs': Trees(search.uct, 4, 3, mix=0.0, c=2.0),
  'without replacement, 4 paths': Different(4),
  'without replacement, 12 paths': Different(12),
}

# What `--tune` tries.
FUNCTIONS = {'puct': search.puct, 'uct': search.uct, 'gumbel': search.gumbel_interior}
GRID: dict[str, Way] = {
  f'guided K={k} x {n}, temperature {t}': Descents(k, n, t)
  for k, n, t in ((4, 1, 0.0), (10, 1, 0.0), (20, 1, 0.0), (5, 2, 0.5), (3, 4, 0.5))
}
GRID |= {f'guided K=10 x 1, prior {w}': Descents(10, prior=w) for w in (0.25, 0.5, 1.0)}
GRID |= {
  f'{name} K={k} x {n}, mix {mix}, c {c}': Trees(rule, k, n, mix, c)
  for name, rule in FUNCTIONS.items()
  for k, n, mix, c in (
    *((k, n, 1.0, 0.1) for k, n in ((4, 7), (4, 11), (8, 6), (16, 6), (8, 12))),
    *((4, 7, 1.0, 1.0), (3, 2, 0.5, 0.1), (3, 2, 0.0, 0.1), (2, 4, 0.0, 0.3)),
    *((2, 8, 0.0, 0.3), (3, 5, 0.0, 0.3), (4, 3, 0.0, 0.3)),
  )
}
