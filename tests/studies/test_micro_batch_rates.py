"""Learning rates of the micro-batch study: each norm at its own best, which
validation pictures have no part in."""

import copy
import csv
import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import DATASETS, init_default_scope

from studies.micro_batch import plan
from studies.micro_batch.norms import parse_norm
from studies.micro_batch.records import (
    CLOSE,
    commit,
    keep,
    known,
    rates_of,
    summarize,
)
from studies.micro_batch.tasks import TASKS, Run, digits

pytest_plugins = ['study_data']

RATES = (0.01, 0.02, 0.04)
errors = st.floats(0, 100)


def record(rate, seed, error, held, norm='bcn', held_out=5, **more):
    run = Run('street', norm, 1, seed, 1, 10, rate, held_out=held_out)
    return dict(run._asdict(), error=error, held=held, **more)


@st.composite
def grids(draw):
    """All rates with the first seed, and some with a second."""
    return [
        record(rate, seed, draw(errors), draw(errors))
        for rate in RATES
        for seed in range(draw(st.integers(1, 2)))
    ]


small = st.integers(1, 12)
some_runs = st.builds(
    Run,
    *(st.sampled_from(['digits', 'photos']), st.sampled_from(['bn', 'bcn,momentum=1'])),
    *(small, small, small, small, st.sampled_from(RATES), small | st.just(0), small),
)


@given(some_runs, st.data())
def test_runs_that_differ_are_kept_apart(run, data):
    """A longer training does not take the place of a shorter one, and so on."""
    key = data.draw(st.sampled_from(Run._fields))
    other = run._replace(**{key: getattr(data.draw(some_runs), key)})
    with tempfile.TemporaryDirectory() as folder:
        for error, kept in enumerate((run, other)):
            keep(kept, dict(kept._asdict(), error=error), Path(folder))
        assert known(run, Path(folder))['error'] == (run == other)
        assert known(other, Path(folder))['error'] == 1


@given(grids(), st.randoms())
def test_the_choice_does_not_see_validation(members, random):
    others = [dict(r, error=random.uniform(0, 100)) for r in members]
    assert rates_of(others) == rates_of(members)
    # nor does that of what is run next
    runs = [Run('street', 'bcn', 1, 1, 1, 10, rate, held_out=5) for rate in RATES]
    first, first_of_others = (
        [r for r in group if r['seed'] == 0] for group in (members, others)
    )
    assert plan.promising(runs, first) == plan.promising(runs, first_of_others)


@given(grids())
def test_the_row_is_at_the_norms_own_best(members):
    # a norm beside it does not matter
    row = summarize([*members, record(0.04, 0, 0.0, 0.0, norm='gn')])[
        'street', 'bcn', 1
    ]
    at_best = [r for r in members if r['rate'] == row['rate']]
    assert row['mean'] == pytest.approx(np.mean([r['error'] for r in at_best]))
    assert row['rate'] in row['close'] and set(row['close']) <= set(RATES)
    seeds = {rate: sum(r['rate'] == rate for r in members) for rate in RATES}
    assert seeds[row['rate']] == max(seeds.values())
    for rate in RATES:
        held = [r['held'] for r in members if r['rate'] == rate]
        if seeds[rate] == row['seeds']:
            gap = np.mean(held) - np.mean([r['held'] for r in at_best])
            assert gap >= -1e-9
            assert (rate in row['close']) == (gap <= CLOSE) or abs(gap - CLOSE) < 1e-9


def test_what_failed_and_what_diverged():
    failed = dict(record(0.01, 0, None, None))
    del failed['held']
    diverged = record(0.04, 0, 100.0, 100.0, diverged=True)
    (row,) = summarize([failed, record(0.02, 0, 7.0, 9.0), diverged]).values()
    assert (row['rate'], row['mean'], row['failed']) == (0.02, 7.0, 1)
    assert row['diverged'] == [0.04] and row['close'] == [0.02]
    (row,) = summarize([failed]).values()
    assert row['failed'] == 1 and np.isnan(row['mean'])


def test_titles_tell_variants_apart():
    names = ['bcn-read', 'bcn-read,frozen=true', 'bcn-read,frozen=false']
    names += ['bcn-read,warmup=5', 'bcn-read,warmup=5,frozen=true']
    titles = [parse_norm(name).title for name in names]
    assert len(set(titles)) == len(titles)
    assert titles[1] == 'BCN from BN weights, early stages frozen'


def test_commit_of_a_run():
    words = ['git', 'rev-parse', '--short', 'HEAD']
    try:
        head = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    except OSError:
        head = ''
    assert re.sub('-dirty$', '', commit()) == head.strip()


def test_without_held_out_pictures_the_error_itself_decides():
    members = [record(r, 0, e, None, held_out=0) for r, e in zip(RATES, (3, 1, 2))]
    assert rates_of(members) == (0.02, list(RATES))


@pytest.mark.parametrize('task', ['det', 'seg', 'street'])
def test_held_out_pictures_are_not_trained_on(task, shapes, street, monkeypatch):
    monkeypatch.setenv('SHAPES_ROOT', str(shapes))
    monkeypatch.setenv('STREET_ROOT', str(street))
    whole = 7 if task == 'street' else 12
    run = Run(task, 'bcn', 1, 0, 1, whole - 2, 0.01, held_out=2)
    cfg = TASKS[task].config(run)
    init_default_scope(cfg.default_scope)

    def files(loader):
        data = DATASETS.build(copy.deepcopy(loader.dataset))
        return [data.get_data_info(k)['img_path'] for k in range(len(data))]

    trained, held = files(cfg.train_dataloader), files(cfg.val_dataloader)
    assert len(trained) == whole - 2 and len(held) == 2
    alone = TASKS[task].config(run._replace(pictures=whole, held_out=0))
    assert alone.val_dataloader is None
    assert sorted(trained + held) == sorted(files(alone.train_dataloader))
    tested = files(cfg.test_dataloader)
    assert tested and not {*tested} & {*trained, *held}
    same = 'pipeline'
    assert cfg.val_dataloader.dataset[same] == cfg.test_dataloader.dataset[same]


def test_held_out_digits_are_not_trained_on(monkeypatch, tmp_path):
    pytest.importorskip('sklearn', reason='the digits need scikit-learn')
    shown, batches = [], digits.batches

    def watched(run, pictures, classes):
        shown.append(len(pictures))
        assert pictures.data_ptr() == digits_.data_ptr()  # the first ones
        yield from batches(run, pictures, classes)

    digits_, classes = digits.digits()
    monkeypatch.setattr(digits, 'digits', lambda: (digits_, classes))
    monkeypatch.setattr(digits, 'batches', watched)
    run = Run('digits', 'gn', 100, 0, 1, 834, 0.1, held_out=166)
    result = TASKS['digits'].train(run, tmp_path)
    assert shown == [834] and 0 < result['held'] < 100
    # counts of 166 and of 797 pictures
    for error, count in ((result['held'], 166), (result['error'], 797)):
        assert error * count / 100 == pytest.approx(round(error * count / 100))


def trainings_with_optima(optimum, monkeypatch):
    """Digits that each norm is best on at a rate; what was run since last asked."""
    runs = []

    def train(run, folder):
        runs.append(run)
        distance = abs(np.log(run.rate / optimum[run.norm]))
        return dict(error=10 * distance, held=20 * distance)

    def performed():
        done, runs[:] = list(runs), []
        return {(r.norm, r.rate, r.seed) for r in done}

    monkeypatch.setattr(TASKS['digits'], 'prepare', lambda args: None)
    monkeypatch.setattr(TASKS['digits'], 'train', train)
    return performed


def test_further_seeds_have_the_two_best_rates(tmp_path, monkeypatch, one_by_one):
    """Nothing that is known is run again, and with --show nothing at all."""
    optimum = {'gn': 0.2, 'in': 0.35, 'bcn': 0.8}
    performed = trainings_with_optima(optimum, monkeypatch)

    def study(*more):
        said = one_by_one(
            *('--tasks', 'digits', '--images', 16, '--norms', *optimum),
            *('--rates', 0.0125, 0.025, 0.05, '--work-dir', tmp_path, *more),
        )
        return performed(), said

    rates = (0.2, 0.4, 0.8)
    first = {(norm, rate, 0) for norm in optimum for rate in rates}
    assert study('--seeds', 1)[0] == first
    best = {'gn': rates[:2], 'in': rates[:2], 'bcn': rates[1:]}
    further = {(norm, rate, 1) for norm in best for rate in best[norm]}
    assert study('--seeds', 2)[0] == further
    assert study('--seeds', 2)[0] == set()
    done, said = study('--seeds', 3, '--show')
    assert done == set()
    for where in ('0.2, the lowest', '0.4', '0.8, the highest'):
        assert f'at {where} of 3 rates' in said
    records = json.loads((tmp_path / 'results.json').read_text())
    assert len(records) == len(first | further)
    assert all((r['pictures'], r['held_out']) == (834, 166) for r in records)
    # every run that is kept here, whatever was asked for now
    study('--norms', 'gn', '--show')
    with (tmp_path / 'runs.csv').open() as file:
        lines = {
            (r['norm'], float(r['rate']), int(r['seed'])): r
            for r in csv.DictReader(file)
        }
    assert set(lines) == {(r['norm'], r['rate'], r['seed']) for r in records}
    for r in records:
        line = lines[r['norm'], r['rate'], r['seed']]
        assert float(line['error']) == pytest.approx(r['error'], rel=1e-3)
        assert float(line['held']) == pytest.approx(r['held'], rel=1e-3)
        assert line['commit'] == commit() and line['diverged'] == ''
    study('--seeds', 3, '--show')
    table = (tmp_path / 'results.md').read_text()
    assert '| GN | 0.0 ± 0.0 | 2 | 0.2 |' in table


def test_rates_go_on_beyond_the_best(tmp_path, monkeypatch, one_by_one):
    """Until it is neither the lowest nor the highest, three times at most."""
    optimum = {'gn': 0.2, 'in': 1.7, 'bcn': 1e-9}
    performed = trainings_with_optima(optimum, monkeypatch)

    def study(*more):
        said = one_by_one(
            *('--tasks', 'digits', '--images', 1, '--norms', *optimum, '--extend'),
            *('--rates', 0.1, 0.2, 0.4, '--work-dir', tmp_path, *more),
        )
        return performed(), said

    added = {('in', 0.8, 0), ('in', 1.6, 0), ('in', 3.2, 0)}
    added |= {('bcn', rate, 0) for rate in (0.05, 0.025, 0.0125)}
    first = {(norm, rate, 0) for norm in optimum for rate in (0.1, 0.2, 0.4)}
    assert study('--seeds', 1)[0] == first | added
    best = [('gn', 0.2), ('in', 1.6), ('in', 3.2), ('bcn', 0.0125), ('bcn', 0.025)]
    # 0.1 and 0.4 are as far from 0.2
    done = study('--seeds', 2)[0]
    assert done - {('gn', 0.1, 1), ('gn', 0.4, 1)} == {(*pair, 1) for pair in best}
    assert len(done) == len(best) + 1
    # what was added is shown too, and not run again
    for more in ((), ('--show',)):
        done, said = study('--seeds', 2, *more)
        assert done == set()
        assert 'at 0.0125, the lowest of 6 rates' in said
        assert 'at 1.6 of 6 rates' in said and 'at 0.2 of 3 rates' in said


def test_a_rate_that_failed_is_not_gone_beyond():
    runs = [Run('street', 'bcn', 1, 0, 1, 10, rate, held_out=5) for rate in RATES]
    records = [record(r.rate, 0, 9 - k, 9 - k) for k, r in enumerate(runs)]
    (next_,) = plan.beyond(runs, records)
    assert next_ == runs[0]._replace(rate=0.08)
    failed = dict(record(0.08, 0, None, None))
    del failed['held']
    assert plan.beyond([*runs, next_], [*records, failed]) == []
    # of one rate nothing is known beyond it
    assert plan.beyond(runs[:1], records[:1]) == []
