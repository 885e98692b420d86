"""Convert every config of the installed mmdet and mmsegmentation to BCN.

For each config, the stock model is built, the config converted, written, read
back and its model built; the norms of both are counted. For one config of each
method's folder, the one with the smallest model that does it, both models
also train two steps on random pictures (--steps). Results are kept as they
come, so that a run that was stopped goes on where it was.
"""

import argparse
import collections
import contextlib
import copy
import fnmatch
import io
import json
import os
import signal
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional

import torch
from measuring import progress_bar, write_json
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import BaseDataElement
from pictures import draw
from rich.console import Console
from rich.table import Table

from bcn_mm import BCN
from bcn_mm.convert import (
    build_model,
    describe,
    in_scope,
    leftovers,
    to_bcn,
    write_config,
)
from bcn_mm.engine.cli import forget_pretrained, one_line_errors
from bcn_mm.errors import InputError

PACKAGES = dict(mmdet='mmdet', mmseg='mmsegmentation')
# Height and width of the pictures for training steps; where the stock model
# does not take the first, the next is tried, at last what the config says.
SHAPES = ((128, 160), (256, 256), (512, 512), None)
CANDIDATES = 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/analysis_tools/survey_zoo.py --steps
  python tools/analysis_tools/survey_zoo.py --only "mmdet::fcos/*" --fresh""",
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=['*'],
        metavar='PATTERN',
        help='configs to look at, e.g. "mmdet::fcos/*" (default: all)',
    )
    parser.add_argument(
        '--ws', action='store_true', help='convert the convolutions too'
    )
    parser.add_argument(
        '--steps',
        action='store_true',
        help='also train two steps for one config of each folder',
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=os.cpu_count(),
        help='processes (default: one per core, %(default)s)',
    )
    parser.add_argument(
        '--timeout',
        type=int,
        default=300,
        metavar='SECONDS',
        help='for one config (%(default)s)',
    )
    parser.add_argument(
        '--json',
        type=Path,
        default=Path('work_dirs/survey_zoo.json'),
        help='where results are kept, and taken up again (%(default)s)',
    )
    parser.add_argument('--fresh', action='store_true', help='take nothing up again')
    return parser.parse_args()


def zoo(package: str) -> Path:
    """The folder that an installed package ships its configs in."""
    return Path(find_spec(package).origin).parent / '.mim'


def configs(patterns: Iterable[str]) -> List[str]:
    """The configs of the installed packages, as ``package::path``."""
    found = []
    for package in PACKAGES:
        if find_spec(package) is None:
            continue
        folder = zoo(package) / 'configs'
        for path in sorted(folder.rglob('*.py')):
            name = path.relative_to(folder)
            if name.parts[0] not in ('_base_', 'common'):
                found.append(f'{package}::{name.as_posix()}')
    return [n for n in found if any(fnmatch.fnmatch(n, p) for p in patterns)]


def folder_of(name: str) -> str:
    """The method's folder, e.g. ``mmdet::fcos``."""
    return name.split('/')[0]


# -- in a worker process -----------------------------------------------------


@contextlib.contextmanager
def quiet(name: str):
    """No output; relative paths are those of the package's own configs."""
    folder = os.getcwd()
    os.chdir(zoo(name.split('::')[0]))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter('ignore')
            yield
    finally:
        os.chdir(folder)


@contextlib.contextmanager
def limit(seconds: int):
    def stop(*_):
        raise TimeoutError(f'not done after {seconds} s')

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def read(name: str) -> Config:
    package, path = name.split('::')
    cfg = Config.fromfile(zoo(package) / 'configs' / path)
    # as the runner does
    if 'data_preprocessor' in cfg and 'model' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


def build(cfg: Config) -> torch.nn.Module:
    """The model of a config, without values where that is possible."""
    with in_scope(cfg) as registry:
        return build_model(cfg.model, registry)


def counts(model: torch.nn.Module) -> Dict[str, int]:
    found = {kind: len(names) for kind, names in leftovers(model).items()}
    replaced = sum(isinstance(m, BCN) for m in model.modules())
    return dict(found, BCN=replaced) if replaced else found


def look_at(name: str, ws: bool, timeout: int) -> dict:
    """Build the stock and the converted model of one config."""
    result = {}
    with quiet(name), limit(timeout):
        try:
            cfg = read(name)
            if 'model' not in cfg:
                return dict(skipped='no model')
            if cfg.get('default_scope') not in PACKAGES:
                return dict(skipped='of another scope')
            key = repr((cfg.default_scope, cfg.model.to_dict(), ws))
            if key not in _seen:
                _seen.clear()  # neighbours are alike, others are not
                _seen[key] = compare(cfg, name, ws)
            result.update(_seen[key])
        except Exception as e:
            result['stock_error'] = describe(e)
    return result


_seen: Dict[str, dict] = {}


def compare(cfg: Config, name: str, ws: bool) -> dict:
    try:
        model = build(cfg)
    except Exception as e:
        return dict(stock_error=describe(e))
    result = dict(
        stock=counts(model),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    try:
        changes = []
        new = to_bcn(cfg, ws=ws, changes=changes)
        result['levels'] = sorted(
            {c.after for c in changes if c.path.endswith('num_levels')}
        )
        result['notes'] = sorted(
            {c.note for c in changes if c.before == c.after and c.note}
        )
        package, path = name.split('::')
        with tempfile.TemporaryDirectory() as folder:
            source = str(zoo(package) / 'configs' / path)
            write_config(
                to_bcn(Config.fromfile(source), ws=ws), source, f'{folder}/config.py'
            )
        if to_bcn(new, ws=ws).to_dict() != new.to_dict():
            raise AssertionError('a second conversion changed something')
        model = build(new)
        result['converted'] = counts(model)
        result['left'] = {
            where: kind for kind, names in leftovers(model).items() for where in names
        }
    except Exception as e:
        result['error'] = describe(e)
    return result


def tensors(output) -> List[torch.Tensor]:
    """Everything that was predicted."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, BaseDataElement):
        output = dict(output.items())
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, (list, tuple, type({}.values()))):
        return [t for part in output for t in tensors(part)]
    return []


def train(cfg: Config, batch_size: int, shape) -> dict:
    """Two training steps and two evaluations, on the CPU."""
    torch.manual_seed(0)
    cfg = copy.deepcopy(cfg)
    # pictures stay as small as they are
    preprocessor = cfg.model.get('data_preprocessor') or {}
    preprocessor.pop('batch_augments', None)
    if preprocessor.get('size'):
        preprocessor.size = shape
    # as the runner starts, but from random weights
    forget_pretrained(cfg.model)
    with in_scope(cfg) as registry:
        model = build_model(cfg.model, registry, 'cpu')
        model.init_weights()
        model = revert_sync_batchnorm(model).train()
        batch = draw(cfg, batch_size, shape)
        layers = [m for m in model.modules() if isinstance(m, BCN)]
        start = [m.running_mean.clone() for m in layers]
        losses = take_steps(model, batch)
        used = [bool(m.num_batches_tracked.sum()) for m in layers]
        moved = [
            not torch.equal(m.running_mean, s) and bool(m.running_mean.isfinite().all())
            for m, s in zip(layers, start)
        ]
        if used != moved or (layers and not any(moved)):
            raise AssertionError('an estimate has not moved')
        check_evaluation(model, batch)
    return dict(losses=losses, moved=sum(moved), layers=len(layers))


def take_steps(model, batch) -> List[float]:
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4
    )
    losses = []
    for _ in range(2):
        data = model.data_preprocessor(batch, True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        if not torch.isfinite(loss):
            raise AssertionError(f'the loss is {float(loss)}')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@torch.no_grad()
def check_evaluation(model, batch) -> None:
    """It is the same twice, and changes nothing."""
    model.eval()
    if isinstance(batch['inputs'], dict):  # branches of semi-supervision
        batch = {key: branches['sup'] for key, branches in batch.items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        data = model.data_preprocessor(copy.deepcopy(batch), False)
        outputs.append(tensors(model(**data, mode='predict')))
    one, two = outputs
    if not one or not all(map(torch.equal, one, two)):
        raise AssertionError('evaluation is not deterministic')
    for key, value in model.state_dict().items():
        if not torch.equal(value, state[key]):
            raise AssertionError(f'evaluation changed {key}')


def two_steps(names: List[str], ws: bool, timeout: int) -> dict:
    """Train the stock model of one of these configs, then the converted."""
    result = {}
    for name in names:
        for shape in SHAPES:
            with quiet(name), limit(timeout):
                try:
                    cfg = read(name)
                    own = cfg.model.get('data_preprocessor', {}).get('size')
                    shape = shape or own
                    if shape is None:
                        continue
                    stock = train(cfg, 2, shape)
                except Exception as e:
                    result.setdefault('stock_error', describe(e))
                    continue
                result = dict(config=name, shape=shape, stock=stock)
                try:
                    # what it is for: one picture a step
                    result['converted'] = train(to_bcn(cfg, ws=ws), 1, shape)
                except Exception as e:
                    result['error'] = describe(e)
                return result
    return dict(result, config=names[0])


def prepare() -> None:
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('ERROR')
    os.environ['HF_HUB_OFFLINE'] = '1'  # nothing is fetched
    # where models look the epoch up
    MessageHub.get_current_instance().update_info('epoch', 0)
    # some norms ask for a process group when they are built
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )


# -- the survey --------------------------------------------------------------


def gather(
    function: Callable[..., dict],
    tasks: Dict[str, tuple],
    jobs: int,
    done: Callable[[str, dict], None],
) -> None:
    """Run tasks in processes; one whose process dies is told apart."""
    waiting = dict(tasks)
    alone = False
    while waiting:
        batch = dict([next(iter(waiting.items()))]) if alone else waiting
        with ProcessPoolExecutor(1 if alone else jobs, initializer=prepare) as pool:
            futures = {
                pool.submit(function, *words): name for name, words in batch.items()
            }
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
                    waiting.pop(futures[future])
                alone = False
            except BrokenProcessPool:
                if alone:
                    (name,) = batch
                    done(name, dict(stock_error='the process died'))
                    waiting.pop(name)
                alone = not alone
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def survey(args: argparse.Namespace) -> dict:
    names = configs(args.only)
    if not names:
        raise InputError(f'no config matches {" ".join(args.only)}')
    about = {d: version(d) for d in ('torch', 'mmcv', *PACKAGES.values())}
    about['ws'] = args.ws
    content = dict(about=about, configs={}, steps={})
    if args.json.is_file() and not args.fresh:
        earlier = json.loads(args.json.read_text())
        if earlier['about'] != about:
            raise InputError(
                f'{args.json} is of {earlier["about"]}, not of {about}; '
                f'choose another --json, or --fresh'
            )
        content = earlier
    results, steps = content['configs'], content['steps']

    def collect(into, what, function, tasks):
        with progress_bar() as bar:
            tick = bar.add_task(what, total=len(tasks))

            def done(name, result):
                into[name] = result
                bar.advance(tick)
                write_json(args.json, content)

            gather(function, tasks, args.jobs, done)

    collect(
        results,
        'configs',
        look_at,
        {n: (n, args.ws, args.timeout) for n in names if n not in results},
    )
    if args.steps:
        folders = collections.defaultdict(list)
        for n in names:
            if results[n].get('stock'):
                folders[folder_of(n)].append(n)
        tasks = {}
        for folder, members in folders.items():
            if folder not in steps:
                sizes = {}  # one of each size is enough
                for n in sorted(members, key=len):
                    sizes.setdefault(results[n]['parameters'], n)
                smallest = [sizes[k] for k in sorted(sizes)][:CANDIDATES]
                tasks[folder] = (smallest, args.ws, args.timeout)
        collect(steps, 'folders', two_steps, tasks)
    return content


def summary(results: dict) -> Table:
    table = Table(title='Norms by method')
    for heading in (
        'method',
        'configs',
        'stock model builds',
        'with norms',
        'converted',
        'norms',
        'to BCN',
        'left',
    ):
        table.add_column(heading, justify='left' if heading == 'method' else 'right')
    groups = collections.defaultdict(list)
    for name, result in results.items():
        if 'skipped' not in result:
            groups[folder_of(name)].append(result)
    rows = [(name, *totals(group)) for name, group in sorted(groups.items())]
    for row in rows:
        table.add_row(*map(str, row))
    table.add_section()
    table.add_row('all', *map(str, map(sum, list(zip(*rows))[1:])))
    return table


def totals(group: List[dict]) -> tuple:
    """Of one method: the numbers in its row."""
    built = [r for r in group if 'stock' in r]
    norms = [r for r in built if r['stock']]
    good = [r for r in norms if 'error' not in r]
    return (
        len(group),
        len(built),
        len(norms),
        len(good),
        sum(sum(r['stock'].values()) for r in good),
        sum(r['converted'].get('BCN', 0) for r in good),
        sum(len(r['left']) for r in good),
    )


def by_reason(items: Iterable, heading: str) -> Optional[Table]:
    """Names grouped by why; None if there are none."""
    groups = collections.defaultdict(list)
    for name, reason in items:
        groups[reason[:160]].append(name)
    if not groups:
        return None
    table = Table(title=heading, show_lines=True)
    table.add_column('reason', ratio=3)
    table.add_column('configs', justify='right')
    table.add_column('where', ratio=2)
    for reason, names in sorted(groups.items(), key=lambda i: -len(i[1])):
        where = sorted({n.rsplit('/', 1)[0] for n in names})
        table.add_row(reason, str(len(names)), ', '.join(where))
    return table


def report(content: dict, console: Console) -> int:
    """Print the tables; returns the number of failures."""
    results, steps = content['configs'], content['steps']
    tables = [
        summary(results),
        by_reason(
            ((n, r['stock_error']) for n, r in results.items() if 'stock_error' in r),
            'The stock model does not build',
        ),
        by_reason(
            (
                (n, f'{kind} {where}')
                for n, r in results.items()
                for where, kind in last_words(r.get('left') or {}).items()
            ),
            'Norms left: built by a component without asking its config',
        ),
        by_reason(
            ((n, r['error']) for n, r in results.items() if 'error' in r),
            'FAILED: the stock model builds, the converted one does not',
        ),
    ]
    if steps:
        good = [s for s in steps.values() if 'converted' in s]
        console.print(f'Two steps: {len(good)} of {len(steps)} folders')
        tables += [
            by_reason(
                ((f, s['stock_error']) for f, s in steps.items() if 'stock' not in s),
                'Two steps: the stock model does not train',
            ),
            by_reason(
                ((f, s['error']) for f, s in steps.items() if 'error' in s),
                'FAILED: the stock model trains, the converted one does not',
            ),
        ]
    for table in filter(None, tables):
        console.print(table)
    return sum('error' in r for r in (*results.values(), *steps.values()))


def last_words(left: Dict[str, str]) -> Dict[str, str]:
    """Layers by their place in the model, numbers left out."""
    return {
        '.'.join(w for w in where.split('.') if not w.isdigit()): kind
        for where, kind in left.items()
    }


def main() -> None:
    args = parse_args()
    console = Console()
    with one_line_errors():
        content = survey(args)
    failures = report(content, console)
    console.print(f'Results are in {args.json}')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
