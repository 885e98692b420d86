"""All that was asked for, and what of it is known already."""

import argparse
import collections
import importlib
import json
from typing import Callable, Dict, List

from bcn_mm._files import write_json
from bcn_mm.engine.progress import progress_bar
from bcn_mm.errors import InputError

from .conversion import look_at
from .training import two_steps
from .workers import gather
from .zoo import configs, folder_of

# How many configs of a folder may be tried until one trains.
CANDIDATES = 2


def survey(args: argparse.Namespace) -> dict:
    """Do what is not in ``args.json`` yet, and add it there as it comes.

    Returns:
        dict: ``about``, the versions; ``configs``, by name what became of each;
        ``steps``, by folder how its models trained.

    Raises:
        InputError: if there is no such config or package, or the file is of
            other versions.
    """
    names = configs(args.packages, args.only)
    if not names:
        raise InputError(f'no config matches {" ".join(args.only)}')
    # the fork's distributions have other names
    packages = ('torch', 'mmcv', *args.packages)
    about = {p: importlib.import_module(p).__version__ for p in packages}
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

    def collect(into: dict, what: str, function: Callable, tasks: dict) -> None:
        with progress_bar() as bar:
            tick = bar.add_task(what, total=len(tasks))

            def done(name, result):
                into[name] = result
                bar.advance(tick)
                write_json(args.json, content)

            gather(function, tasks, args.jobs, done)

    tasks = {n: (n, args.ws, args.timeout) for n in names if n not in results}
    collect(results, 'configs', look_at, tasks)
    if args.steps:
        tasks = {
            folder: (candidates, args.ws, args.timeout)
            for folder, candidates in _smallest(names, results).items()
            if folder not in steps
        }
        collect(steps, 'folders', two_steps, tasks)
    return content


def _smallest(names: List[str], results: Dict[str, dict]) -> Dict[str, List[str]]:
    """The configs with the smallest models of every folder that has norms."""
    folders = collections.defaultdict(list)
    for name in names:
        if results[name].get('stock'):
            folders[folder_of(name)].append(name)
    found = {}
    for folder, members in folders.items():
        sizes = {}  # one of each size is enough
        for name in sorted(members, key=len):
            sizes.setdefault(results[name]['parameters'], name)
        found[folder] = [sizes[k] for k in sorted(sizes)][:CANDIDATES]
    return found
