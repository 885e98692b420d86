"""Which environment is made on which machine, before anything is made."""

import sys

import pytest
from conftest import run

CLASSIC = 'torch==2.1.2, mmcv==2.1.0 prebuilt by OpenMMLab'
COMPILED = 'torch==2.13.0, mmcv==2.1.0 compiled for cuda'


def test_no_such_option():
    done = run('bash', 'tools/setup_env.sh', '--plann')
    assert done.returncode == 1
    assert done.stdout.startswith('[setup] error: there is no option --plann')


@pytest.fixture
def plan(tmp_path):
    """The plan on a machine with these programs in front of its own."""

    def call(smi=None, nvcc=None, **environment):
        programs = tmp_path / 'cuda' / 'bin'
        programs.mkdir(parents=True)
        if smi is not None:
            cards, driver = smi
            script = f'case "$*" in *query*) printf "{cards}";; *) cat <<E\n'
            script += f'| NVIDIA-SMI 1  Driver Version: 1  CUDA Version: {driver}  |\n'
            script += 'E\nesac'
        else:
            script = 'exit 9'  # as where there is no driver
        scripts = {'nvidia-smi': script}
        scripts['nvcc'] = (
            f'echo "Cuda compilation tools, release {nvcc}, V{nvcc}.1"'
            if nvcc
            else 'exit 127'
        )
        for name, text in scripts.items():
            (programs / name).write_text(f'#!/bin/sh\n{text}\n')
            (programs / name).chmod(0o755)
        path = f'{programs}:/usr/local/bin:/usr/bin:/bin'
        own = dict.fromkeys(('MM_STACK', 'DEVICE', 'TORCH_CUDA_ARCH_LIST'), '')
        own['CUDA_HOME'] = str(tmp_path / 'cuda')
        environment = {**own, **environment}
        return run('bash', 'tools/setup_env.sh', '--plan', PATH=path, **environment)

    return call


@pytest.mark.parametrize(
    'machine, environment, expected',
    [
        (dict(), {}, 'torch==2.13.0, mmcv==2.1.0 compiled for cpu'),
        (dict(nvcc='13.0'), {}, 'torch==2.13.0, mmcv==2.1.0 compiled for cpu'),
        (dict(smi=('8.6\\n', '12.2')), {}, CLASSIC),
        (dict(smi=('8.6\\n', '13.0')), {}, CLASSIC),  # no nvcc
        (dict(smi=('8.6\\n', '13.0'), nvcc='12.4'), {}, CLASSIC),
        (dict(smi=('8.6\\n', '12.4'), nvcc='13.0'), {}, CLASSIC),  # old driver
        (dict(smi=('8.6\\n', '13.0'), nvcc='13.0'), {}, COMPILED),
        (dict(smi=('8.6\\n', '13.1'), nvcc='13.0'), dict(MM_STACK='classic'), CLASSIC),
        (
            dict(smi=('8.6\\n', '13.1'), nvcc='13.0'),
            dict(MM_STACK='onedl'),
            'onedl-mmcv==2.3.6 compiled for cuda',
        ),
        (
            dict(smi=('8.6\\n', '13.1'), nvcc='13.0'),
            dict(DEVICE='cpu'),
            'mmcv==2.1.0 compiled for cpu',
        ),
        (
            dict(nvcc='13.0'),
            dict(DEVICE='cuda', TORCH_CUDA_ARCH_LIST='9.0'),
            COMPILED,
        ),
    ],
)
def test_the_stack_fits_the_machine(plan, machine, environment, expected):
    done = plan(**machine, **environment)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert expected in lines[-1]
    # where there is a choice, it is told with what it was made by
    if 'smi' in machine and 'DEVICE' not in environment:
        assert 'compute capability 8.6' in lines[0]
        assert 'MM_STACK and DEVICE choose otherwise' in lines[0]


@pytest.mark.parametrize(
    'machine, environment, said',
    [
        (dict(), dict(MM_STACK='openlab'), "there is no MM_STACK 'openlab'"),
        (dict(), dict(DEVICE='tpu'), "there is no DEVICE 'tpu'"),
        (
            dict(smi=('8.6\\n', '12.2')),
            dict(MM_STACK='openmmlab'),
            'stack openmmlab compiles mmcv for the GPU, and there is no nvcc',
        ),
        (
            dict(smi=('8.6\\n12.0\\n', '12.8')),
            {},
            'no code for cards of compute capability 12.0',
        ),
        (dict(smi=('7.0\\n', '11.4')), {}, 'needs a driver for CUDA 12'),
        (dict(nvcc='13.0'), dict(DEVICE='cuda'), 'nvidia-smi finds no GPU'),
    ],
)
def test_what_cannot_be_is_said_in_one_line(plan, machine, environment, said):
    done = plan(**machine, **environment)
    assert done.returncode == 1
    errors = [line for line in done.stdout.splitlines() if 'error' in line]
    assert len(errors) == 1 and said in errors[0]
    assert errors[0] == done.stdout.splitlines()[-1]
    # a sentence for what to do
    assert errors[0].count('. ') >= 1


def test_environment_is_of_one_stack():
    ask = 'source tools/setup_env.sh; complete "$0" "$1"'
    fits = {
        stack: run('bash', '-c', ask, sys.executable, stack).returncode == 0
        for stack in ('', 'openmmlab', 'classic', 'onedl')
    }
    assert fits.pop('')
    assert sum(fits.values()) == 1
