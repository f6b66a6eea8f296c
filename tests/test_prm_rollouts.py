"""What the PRM alone learns from: sampled in chunks, gone on with, of problems of its own."""

import dataclasses
import pathlib

import pytest

from o1jax.config import load
from o1jax.stages import policy_sft, prm_rollouts
from o1jax.stages.setup import opened

SMOKE = pathlib.Path(__file__).parents[1] / 'configs/smoke.yaml'


@pytest.fixture
def run(tmp_path):
  given = ['data.judge_problems=5', 'prm.samples=3', 'mesh.data=4', 'mesh.tensor=2']
  config = load(SMOKE, [f'run.dir={tmp_path}/run', *given])
  with opened(config, ['prm']) as there:
    yield there


def test_unseen_problems_are_tried_in_chunks_and_gone_on_with(run, monkeypatch):
  monkeypatch.setattr(prm_rollouts, 'CHUNK', 2)
  found = prm_rollouts.sample_unseen(run, 1, run.base)
  name = 'round1/unseen/prm'
  assert {t.problem_id for t in found} == {p.id for p in run.judge} and len(run.judge) == 5
  assert {t.origin for t in found} == {name} and 12 <= len(found) <= 15
  told = run.bench.store.done(name)
  assert (told['trajectories'], told['problems']) == (len(found), 5)
  assert told['solved'] == len({t.problem_id for t in found if t.accepted})
  chunks = run.bench.store.path(name, 'trajectories')
  assert [path.name for path in sorted(chunks.iterdir())] == [f'0000{i}.jsonl' for i in range(3)]
  (chunks / '00001.jsonl').unlink()
  run.bench.store.path(name, 'done.json').unlink()
  first = (chunks / '00000.jsonl').stat().st_mtime_ns
  assert prm_rollouts.sample_unseen(run, 1, run.base) == found
  assert (chunks / '00000.jsonl').stat().st_mtime_ns == first


def test_the_round_has_its_own_and_nothing_is_tried_for_nothing(run):
  tried = prm_rollouts.sample_tuned(run, 1, run.base)
  assert {t.problem_id for t in tried} == {p.id for p in run.new_problems(1)}
  assert prm_rollouts.sample_unseen(dataclasses.replace(run, judge=()), 0, run.base) == []
  prm = run.config.prm.model_copy(update={'samples': 0})
  none = dataclasses.replace(run, config=run.config.model_copy(update={'prm': prm}))
  assert prm_rollouts.sample_tuned(none, 0, run.base) == []


def test_every_round_tries_a_share_of_the_held_back_problems(run):
  assert run.config.run.rounds == 2  # of five problems two a round
  tried = [prm_rollouts.sample_held_back(run, i, run.base) for i in range(2)]
  ids = [{t.problem_id for t in found} for found in tried]
  assert ids == [{p.id for p in part} for part in (run.judge[:2], run.judge[2:4])]
  assert {t.origin for t in tried[1]} == {'round1/held_back/prm'}


def test_the_policy_knows_nothing_of_held_back_problems(run):
  held = {p.id for p in run.judge}
  assert not held & {p.id for split in (run.train, run.dev, run.test) for p in split}
  assert not held & {p.id for round_ in range(4) for p in run.known_problems(round_)}
  found = [t for t in prm_rollouts.sample_unseen(run, 0, run.base) if t.accepted]
  assert found
  with pytest.raises(KeyError, match=found[0].problem_id):
    policy_sft.verified_documents(run, found, limit=1, seed=0)
