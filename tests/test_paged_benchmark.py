"""Both ways of the benchmark of prefixes end in the same states."""

import pathlib

from sampling_cases import MODEL, tiny_params

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'


def test_gathered_prefixes_give_the_states_of_paged_ones(monkeypatch):
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  import paged

  got = paged.measure(MODEL, tiny_params(), rows=4, width=8, repeats=1)  # which compares states
  assert got['gather'] > 0 and got['paged'] > 0
